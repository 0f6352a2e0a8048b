//! The U-Net's layers in LDM (`openaimodel.py`): blocks are numbered through, where diffusers counts within levels.

use super::names::Names;
use crate::model::config::UnetConfig;

const RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// Every layer's two names.
pub fn names(config: &UnetConfig) -> Names {
    let mut names = Names::default();
    for (diffusers, ldm) in [
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("mid_block.attentions.0", "middle_block.1"),
    ] {
        names.pair(diffusers, ldm);
    }
    names.pairs("mid_block.resnets.0", "middle_block.0", &RESNET);
    names.pairs("mid_block.resnets.1", "middle_block.2", &RESNET);

    let levels = config.block_out_channels.len();
    // A level's blocks: its resnets and what changes the size, which has a number of its own on the way down …
    let stride = config.layers_per_block + 1;
    for level in 0..levels {
        for layer in 0..config.layers_per_block {
            let (block, ldm) = (format!("down_blocks.{level}"), format!("input_blocks.{}", 1 + level * stride + layer));
            names.pairs(&format!("{block}.resnets.{layer}"), &format!("{ldm}.0"), &RESNET);
            names.pair(format!("{block}.attentions.{layer}"), format!("{ldm}.1"));
        }
        let resample = format!("input_blocks.{}.0.op", (level + 1) * stride);
        names.pair(format!("down_blocks.{level}.downsamplers.0.conv"), resample);
    }
    // … and on the way up stands behind the last resnet, and its attention if there is one.
    for index in 0..levels {
        let block = format!("up_blocks.{index}");
        for layer in 0..stride {
            let ldm = format!("output_blocks.{}", index * stride + layer);
            names.pairs(&format!("{block}.resnets.{layer}"), &format!("{ldm}.0"), &RESNET);
            names.pair(format!("{block}.attentions.{layer}"), format!("{ldm}.1"));
        }
        let has_attention = config.up_block_types.get(index).is_some_and(|kind| kind.starts_with("CrossAttn"));
        let position = if has_attention { 2 } else { 1 };
        let resample = format!("output_blocks.{}.{position}.conv", (index + 1) * stride - 1);
        names.pair(format!("{block}.upsamplers.0.conv"), resample);
    }
    names
}
