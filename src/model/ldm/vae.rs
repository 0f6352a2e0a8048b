//! The autoencoder's layers in LDM (`diffusionmodules/model.py`), where the decoder's levels are counted from the full size
//! down, and attention is made of 1×1 convolutions.

use super::names::Names;
use crate::model::config::VaeConfig;

const RESNET: [(&str, &str); 5] =
    [("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("conv_shortcut", "nin_shortcut")];

const ATTENTION: [(&str, &str); 5] =
    [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")];

/// The spelling of the attention's layers in older diffusers files, SD1.4's among them.
const OLD_SPELLING: [(&str, &str); 4] =
    [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];

/// Every layer's two names.
pub fn names(config: &VaeConfig) -> Names {
    let mut names = Names::default();
    for layer in ["quant_conv", "post_quant_conv"] {
        names.pair(layer, layer);
    }
    for side in ["encoder", "decoder"] {
        for (diffusers, ldm) in [("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")] {
            names.pair(format!("{side}.{diffusers}"), format!("{side}.{ldm}"));
        }
        for (index, block) in ["block_1", "block_2"].iter().enumerate() {
            names.pairs(&format!("{side}.mid_block.resnets.{index}"), &format!("{side}.mid.{block}"), &RESNET);
        }
        names.pairs(&format!("{side}.mid_block.attentions.0"), &format!("{side}.mid.attn_1"), &ATTENTION);
    }
    let levels = config.block_out_channels.len();
    for level in 0..levels {
        let (down, ldm_down) = (format!("encoder.down_blocks.{level}"), format!("encoder.down.{level}"));
        let (up, ldm_up) = (format!("decoder.up_blocks.{level}"), format!("decoder.up.{}", levels - 1 - level));
        for layer in 0..config.layers_per_block {
            names.pairs(&format!("{down}.resnets.{layer}"), &format!("{ldm_down}.block.{layer}"), &RESNET);
        }
        for layer in 0..=config.layers_per_block {
            names.pairs(&format!("{up}.resnets.{layer}"), &format!("{ldm_up}.block.{layer}"), &RESNET);
        }
        names.pair(format!("{down}.downsamplers.0.conv"), format!("{ldm_down}.downsample.conv"));
        names.pair(format!("{up}.upsamplers.0.conv"), format!("{ldm_up}.upsample.conv"));
    }
    names
}

/// A tensor's name with the attention's layers in today's spelling.
pub fn new_spelling(name: &str) -> String {
    let is_attention = name.contains(".attentions.");
    let old = OLD_SPELLING.iter().find(|(old, _)| is_attention && name.contains(old));
    old.map_or_else(|| name.to_owned(), |(old, new)| name.replace(old, new))
}

/// Whether diffusers keeps the tensor of this name (its own, in today's spelling) as the weight of a linear layer.
pub fn is_linear(name: &str) -> bool {
    name.contains(".attentions.") && name.ends_with(".weight") && !name.contains(".group_norm.")
}
