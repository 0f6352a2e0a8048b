//! The weights that training starts from: freshly drawn, or those of another model. A plain Stable Diffusion U-Net becomes
//! a joint one by a first layer that does not yet see mask and reference.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::device::Runtime;
use crate::model::params::Params;
use crate::model::widen::{CONV_IN, input_channels, widen};
use crate::model::{Files, UnetConfig};

/// A U-Net's initial parameters.
pub struct UnetStart {
    /// Trainable.
    pub params: Params,
    /// What was changed on the way, for the user.
    pub notice: Option<String>,
}

impl UnetStart {
    /// The weights in `folder`, those of a plain model widened to the joint `config`.
    pub fn from_folder(folder: &Path, config: &UnetConfig, runtime: &Runtime) -> Result<Self> {
        let mut weights = Files::Folder(folder.to_owned()).weights("unet")?;
        let (found, wanted) = (input_channels(&weights)?, config.in_channels);
        let (plain, origin) = (config.latent_channels(), weights.origin().to_owned());
        ensure!(
            found == wanted || found == plain && config.is_joint(),
            "model.start_from: {origin}: {CONV_IN} takes {found} channels; this architecture starts from a joint U-Net \
             of {wanted} (noisy, mask, reference) or from a plain one of {plain}"
        );
        let mut notice = None;
        if found != wanted {
            widen(&mut weights, wanted)?;
            notice = Some(format!(
                "model.start_from: {origin} takes noisy latents alone; {CONV_IN} is widened from {found} to {wanted} \
                 channels, zeros for mask and reference"
            ));
        }
        Ok(Self { params: Params::stored(weights, &runtime.device, runtime.dtype, true), notice })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::model::JointUnet;
    use crate::model::write::write_component;
    use crate::rng::Rng;
    use crate::shape::SetShape;

    const SHAPE: SetShape = SetShape { sets: 1, images: 2 };

    fn config(in_channels: usize) -> UnetConfig {
        let config = serde_json::json!({
            "in_channels": in_channels, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 2, "cross_attention_dim": 16, "norm_num_groups": 4,
        });
        serde_json::from_value(config).unwrap()
    }

    /// A model folder with a random U-Net of so many inputs, and the network.
    fn model(in_channels: usize) -> (tempfile::TempDir, JointUnet) {
        let folder = tempfile::tempdir().unwrap();
        let config = config(in_channels);
        let (unet, vars) = JointUnet::new(&config, Params::random(3, &Device::Cpu, DType::F32)).unwrap();
        let weights: BTreeMap<String, Tensor> =
            vars.into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect();
        write_component(folder.path(), "unet", &config, &weights).unwrap();
        (folder, unet)
    }

    fn output(unet: &JointUnet, input: &Tensor) -> Vec<f32> {
        let timesteps = Tensor::new(&[500i64], &Device::Cpu).unwrap();
        let context = Rng::new(1, "context", 0).normal_tensor(&[2, 5, 16]).unwrap();
        unet.forward(input, &timesteps, &context, SHAPE).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_widened_plain_network_gives_the_same_whatever_mask_and_reference_are() {
        let (folder, plain) = model(4);
        let start = UnetStart::from_folder(folder.path(), &config(9), &Runtime::cpu()).unwrap();
        assert!(start.notice.unwrap().contains("from 4 to 9 channels"));
        let (joint, vars) = JointUnet::new(&config(9), start.params).unwrap();
        assert_eq!(vars[CONV_IN].dims(), [8, 9, 3, 3]);
        let noisy = Rng::new(1, "noisy", 0).normal_tensor(&[2, 4, 8, 8]).unwrap();
        let expected = output(&plain, &noisy);
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        for draw in 0..3 {
            let mask_and_reference = Rng::new(2, "rest", draw).normal_tensor(&[2, 5, 8, 8]).unwrap();
            let input = Tensor::cat(&[&noisy, &(mask_and_reference * draw as f64).unwrap()], 1).unwrap();
            for (value, expected) in output(&joint, &input).iter().zip(&expected) {
                assert!((value - expected).abs() <= 1e-5 * largest, "{value} is not {expected}");
            }
        }
    }

    #[test]
    fn a_joint_network_starts_as_it_is_and_others_are_refused() {
        let (folder, _) = model(9);
        assert!(UnetStart::from_folder(folder.path(), &config(9), &Runtime::cpu()).unwrap().notice.is_none());
        let (folder, _) = model(5);
        let error = UnetStart::from_folder(folder.path(), &config(9), &Runtime::cpu()).err().unwrap().to_string();
        assert!(error.starts_with("model.start_from: ") && error.contains("takes 5 channels"), "{error}");
        assert!(error.contains("a joint U-Net of 9") && error.contains("a plain one of 4"), "{error}");
        // A plain architecture takes no joint weights either.
        let (folder, _) = model(9);
        assert!(UnetStart::from_folder(folder.path(), &config(4), &Runtime::cpu()).is_err());
    }
}
