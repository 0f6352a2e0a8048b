//! The toybox: a world of made-up toys that the program can draw.
//!
//! A [`Subject`] is what a caption cannot say (colours, pattern, proportions, ears, eyes); a set shows one subject in n
//! scenes, each time in another pose. Everything follows from (seed, index). The subjects of [`EVAL_SUBJECTS`] are never
//! drawn for training. Read `subject`, then `toy`, then `scene`; `sheet` draws the collages of the synthesis pipeline.

mod caption;
mod draw;
mod held_out;
mod paint;
mod scene;
pub mod sheet;
mod source;
mod subject;
mod toy;

pub use caption::{WORDINGS, caption};
pub use draw::{Picture, Pose, draw};
pub use held_out::HeldOutToys;
pub use scene::Scene;
pub use source::{ToyboxSource, key};
pub use subject::{EVAL_SUBJECTS, Kind, Subject};

use image::{GrayImage, RgbImage};

use crate::rng::Rng;

/// One subject in several scenes.
pub struct ToySet {
    /// The toy that all pictures show.
    pub subject: Subject,
    /// One a picture.
    pub scenes: Vec<Scene>,
    /// One a picture: kind and scene, nothing of the subject.
    pub captions: Vec<String>,
    /// Square pictures of the asked size.
    pub images: Vec<RgbImage>,
    /// 255 where the toy is.
    pub masks: Vec<GrayImage>,
}

/// Set number `index` of `seed`: `n` pictures of `size` pixels a side of one subject that is not kept for evaluation, in
/// `n` different scenes (repeating after all have been used).
pub fn draw_set(seed: u64, index: u64, n: usize, size: u32) -> ToySet {
    let mut rng = Rng::new(seed, "toybox set", index);
    let subject = loop {
        let subject_seed = rng.next_u64();
        if !EVAL_SUBJECTS.contains(&subject_seed) {
            break Subject::from_seed(subject_seed);
        }
    };
    draw_subject_set(subject, &mut rng, n, size)
}

/// A set of a given subject, scenes and poses drawn from `rng`.
pub fn draw_subject_set(subject: Subject, rng: &mut Rng, n: usize, size: u32) -> ToySet {
    let mut order = Scene::ALL.to_vec();
    rng.shuffle(&mut order);
    let scenes: Vec<Scene> = order.into_iter().cycle().take(n).collect();
    let mut set = ToySet { subject, scenes: scenes.clone(), captions: vec![], images: vec![], masks: vec![] };
    for scene in scenes {
        let picture = draw(&set.subject, scene, rng, size);
        set.images.push(picture.image);
        set.masks.push(picture.mask);
        set.captions.push(caption(set.subject.kind, scene, rng.below(WORDINGS)));
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_a_function_of_seed_and_index() {
        let (a, b, c) = (draw_set(1, 5, 3, 64), draw_set(1, 5, 3, 64), draw_set(1, 6, 3, 64));
        assert_eq!((&a.images, &a.captions), (&b.images, &b.captions));
        assert_ne!(a.images, c.images);
        assert_eq!(a.images[0].dimensions(), (64, 64));
    }

    #[test]
    fn captions_name_kind_and_scene_of_every_picture() {
        for index in 0..50 {
            let set = draw_set(3, index, 4, 16);
            for (caption, scene) in set.captions.iter().zip(&set.scenes) {
                assert!(caption.contains(set.subject.kind.name()), "{caption}");
                assert!(
                    caption.contains(scene.phrase().trim_start_matches("in ").trim_start_matches("on ")),
                    "{caption}"
                );
            }
        }
    }

    #[test]
    fn the_mask_covers_a_sensible_part_of_every_picture() {
        for index in 0..100 {
            for mask in draw_set(9, index, 2, 64).masks {
                let share = mask.pixels().filter(|p| p.0[0] > 127).count() as f64 / (64.0 * 64.0);
                assert!((0.06..0.6).contains(&share), "set {index}: the toy covers {share}");
            }
        }
    }

    #[test]
    fn evaluation_subjects_spread_over_all_kinds() {
        let mut counts = [0; Kind::ALL.len()];
        EVAL_SUBJECTS.for_each(|seed| counts[Subject::from_seed(seed).kind as usize] += 1);
        assert!(counts.iter().all(|&count| (5..=6).contains(&count)), "{counts:?}");
    }

    #[test]
    fn all_kinds_and_scenes_occur_in_training() {
        let (mut kinds, mut scenes) = ([0; Kind::ALL.len()], [0; Scene::ALL.len()]);
        for index in 0..300 {
            let set = draw_set(0, index, 2, 8);
            kinds[set.subject.kind as usize] += 1;
            set.scenes.iter().for_each(|scene| scenes[*scene as usize] += 1);
        }
        assert!(kinds.iter().chain(&scenes).all(|&count| count > 8), "{kinds:?} {scenes:?}");
    }
}
