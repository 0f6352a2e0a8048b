//! What a set is trained to do in a step: which pictures, which of them are given, whose captions are known, at what noise.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::latents::EncodedSet;
use super::settings::JointConfig;
use crate::rng::Rng;

/// Conditions of one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetConditions {
    /// The same for the whole set.
    pub timestep: usize,
    /// The images of the set, in the order they are trained in.
    pub images: Vec<ImageConditions>,
}

/// Conditions of one image of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageConditions {
    /// Its number among the pictures of the set.
    pub picture: usize,
    /// True hides its reference (mask 1).
    pub is_masked: bool,
    /// True puts the empty text in place of its caption.
    pub is_caption_dropped: bool,
}

impl SetConditions {
    /// Draws `n_images` of the set's `n_pictures` pictures, and what is known of them, for one of `train_steps` timesteps.
    pub fn draw(rng: &mut Rng, settings: &JointConfig, train_steps: usize, n_pictures: usize, n_images: usize) -> Self {
        let timestep = rng.below(train_steps);
        let drops_text = rng.chance(settings.set_text_dropout);
        let drops_references = drops_text && rng.chance(0.5);
        let mut order: Vec<usize> = (0..n_pictures).collect();
        rng.shuffle(&mut order);
        let mut images: Vec<ImageConditions> = order[..n_images]
            .iter()
            .map(|&picture| ImageConditions {
                picture,
                // Not `||`: a number is drawn in any case, so that one setting does not shift the others' draws.
                is_masked: drops_references | rng.chance(settings.mask_probability),
                is_caption_dropped: drops_text | rng.chance(settings.image_text_dropout),
            })
            .collect();
        let are_alike = images.iter().all(|image| image.is_masked == images[0].is_masked);
        // At 0 no number is drawn: recipes from before there was this setting keep their draws.
        let mixes = settings.mixed_sets > 0.0 && !drops_references && n_images > 1 && rng.chance(settings.mixed_sets);
        if mixes && are_alike {
            images[rng.below(n_images)].is_masked ^= true;
        }
        Self { timestep, images }
    }
}

impl JointConfig {
    /// Whether masks are needed.
    pub fn weighs_subjects(&self) -> bool {
        self.subject_weight != 1.0
    }

    /// How much each place of a picture's latents counts in the loss, 1 on average (`subject_weight`).
    ///
    /// # Shapes
    /// - `[1, h, w]`
    pub fn weights(&self, set: &EncodedSet, picture: usize) -> Result<Tensor> {
        let Some(subject) = set.subjects.get(picture) else {
            let (_, h, w) = set.latents[picture].dims3()?;
            return Ok(Tensor::ones((1, h, w), DType::F32, &Device::Cpu)?);
        };
        let weights = subject.affine(self.subject_weight - 1.0, 1.0)?;
        Ok(weights.broadcast_div(&weights.mean_all()?)?)
    }

    /// The noise of a set (noise offset: `noise_offset`); offsets are drawn behind it, so that it is the same without them.
    ///
    /// # Shapes
    /// - dims `[n, c, h, w]`
    pub fn noise(&self, rng: &mut Rng, dims: &[usize]) -> Result<Tensor> {
        let noise = rng.normal_tensor(dims)?;
        if self.noise_offset == 0.0 {
            return Ok(noise);
        }
        let offsets = (rng.normal_tensor(&[dims[0], dims[1], 1, 1])? * self.noise_offset)?;
        Ok(noise.broadcast_add(&offsets)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: u64 = 20_000;

    fn drawn() -> Vec<SetConditions> {
        let settings =
            JointConfig { mask_probability: 0.4, set_text_dropout: 0.2, image_text_dropout: 0.1, ..Default::default() };
        (0..STEPS)
            .map(|step| SetConditions::draw(&mut Rng::new(7, "conditions", step), &settings, 1000, 4, 3))
            .collect()
    }

    /// Five standard deviations of a share of `count` draws.
    fn assert_share(hits: usize, count: usize, expected: f64) {
        let share = hits as f64 / count as f64;
        let tolerance = 5.0 * (expected * (1.0 - expected) / count as f64).sqrt();
        assert!((share - expected).abs() < tolerance, "{share} is not {expected} ± {tolerance}");
    }

    #[test]
    fn each_condition_has_its_probability() {
        let sets = drawn();
        let n = sets.len();
        let all = |is: fn(&ImageConditions) -> bool| sets.iter().filter(|set| set.images.iter().all(is)).count();
        // The set's text goes with 0.2; else its three captions go one by one with 0.1.
        assert_share(all(|image| image.is_caption_dropped), n, 0.2 + 0.8 * 0.1f64.powi(3));
        assert_share(all(|image| !image.is_caption_dropped), n, 0.8 * 0.9f64.powi(3));
        // The references go with half of the texts, so with 0.1; else one by one with 0.4.
        assert_share(all(|image| image.is_masked), n, 0.1 + 0.9 * 0.4f64.powi(3));
        assert_share(all(|image| !image.is_masked), n, 0.9 * 0.6f64.powi(3));
        // The null branch of guidance: nothing is known.
        let nothing = all(|image| image.is_masked && image.is_caption_dropped);
        let by_one = |mask: f64, caption: f64| (mask * caption).powi(3);
        assert_share(nothing, n, 0.1 + 0.1 * by_one(0.4, 1.0) + 0.8 * by_one(0.4, 0.1));
    }

    #[test]
    fn pictures_of_a_set_come_once_and_all_alike() {
        let mut counts = [0; 4];
        for set in drawn() {
            let mut pictures: Vec<usize> = set.images.iter().map(|image| image.picture).collect();
            pictures.iter().for_each(|&picture| counts[picture] += 1);
            pictures.sort_unstable();
            pictures.dedup();
            assert_eq!(pictures.len(), 3);
        }
        counts.into_iter().for_each(|count| assert_share(count, STEPS as usize, 0.75));
    }

    #[test]
    fn timesteps_are_even() {
        let sets = drawn();
        assert!(sets.iter().all(|set| set.timestep < 1000));
        for tenth in 0..10 {
            assert_share(sets.iter().filter(|set| set.timestep / 100 == tenth).count(), sets.len(), 0.1);
        }
    }

    #[test]
    fn certainties_are_certain() {
        let certain = |mask_probability, set_text_dropout| JointConfig {
            mask_probability,
            set_text_dropout,
            image_text_dropout: 0.0,
            ..Default::default()
        };
        for step in 0..200 {
            let draw = |settings| SetConditions::draw(&mut Rng::new(1, "conditions", step), &settings, 1000, 2, 2);
            let given = draw(certain(0.0, 0.0));
            assert!(given.images.iter().all(|image| !image.is_masked && !image.is_caption_dropped));
            let hidden = draw(certain(1.0, 1.0));
            assert!(hidden.images.iter().all(|image| image.is_masked && image.is_caption_dropped));
        }
    }

    #[test]
    fn mixed_sets_hold_given_and_hidden_images_and_keep_the_dropout() {
        let settings = JointConfig {
            mask_probability: 0.8,
            mixed_sets: 1.0,
            set_text_dropout: 0.2,
            image_text_dropout: 0.0,
            ..Default::default()
        };
        let mut hidden_sets = 0;
        for step in 0..STEPS {
            let set = SetConditions::draw(&mut Rng::new(8, "conditions", step), &settings, 1000, 4, 3);
            let masked = set.images.iter().filter(|image| image.is_masked).count();
            match masked {
                3 => {
                    assert!(set.images.iter().all(|image| image.is_caption_dropped), "only dropout hides all");
                    hidden_sets += 1;
                }
                _ => assert!((1..3).contains(&masked), "{masked} of 3 hidden"),
            }
        }
        assert_share(hidden_sets, STEPS as usize, 0.1);
        let alone = SetConditions::draw(&mut Rng::new(8, "conditions", 0), &settings, 1000, 4, 1);
        assert_eq!(alone.images.len(), 1, "a set of one cannot be mixed");
    }

    #[test]
    fn a_noise_offset_is_one_number_a_channel_of_a_picture() {
        let noise = |noise_offset| {
            let settings = JointConfig { noise_offset, ..Default::default() };
            let noise = settings.noise(&mut Rng::new(1, "training noise", 0), &[2, 3, 4, 5]).unwrap();
            noise.reshape((6, 20)).unwrap().to_vec2::<f32>().unwrap()
        };
        let (plain, shifted) = (noise(0.0), noise(0.5));
        let mut offsets = vec![];
        for (plain, shifted) in plain.iter().zip(&shifted) {
            let gaps: Vec<f32> = plain.iter().zip(shifted).map(|(plain, shifted)| shifted - plain).collect();
            assert!(gaps.iter().all(|gap| (gap - gaps[0]).abs() < 1e-6), "{gaps:?}");
            offsets.push(gaps[0]);
        }
        assert!(offsets.iter().all(|offset| *offset != 0.0) && offsets[0] != offsets[1], "{offsets:?}");
    }

    #[test]
    fn the_subject_counts_more_and_the_picture_as_much_as_before() {
        let subject = Tensor::new(&[[[0f32, 0.5], [1.0, 0.0]]], &Device::Cpu).unwrap();
        let latents = vec![Tensor::zeros((4, 2, 2), DType::F32, &Device::Cpu).unwrap(); 2];
        let set = EncodedSet { latents, tokens: vec![], subjects: vec![subject] };
        let settings = JointConfig { subject_weight: 3.0, ..Default::default() };
        let weights =
            |picture| settings.weights(&set, picture).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // 1, 2, 3 and 1 over their mean; a picture of which nothing is known counts evenly.
        let expected = [1.0, 2.0, 3.0, 1.0].map(|weight: f32| weight / 1.75);
        assert!(weights(0).iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6));
        assert_eq!(weights(1), [1.0; 4]);
    }
}
