//! Stage 5: each instance at a random place of an empty picture, in a random size, and a scene painted around it.

use anyhow::{Result, ensure};
use image::{GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage, imageops};
use serde::{Deserialize, Serialize};

use super::draft::{Draft, Picture, pictures_of};
use super::painting::SamplerName;
use super::patience::{Patience, answers};
use super::settings::Common;
use super::stage::{Area, Cutout, InpaintAsk, Stage};
use super::tool::Tools;
use crate::rng::Rng;

/// Goes up when this stage answers otherwise from the same models.
pub const VERSION: u32 = 1;

/// The composition's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ComposeSettings {
    /// `toybox`: the embedded model by the replacement trick; else a folder, a single file or a name on the hub of Stable
    /// Diffusion for inpainting, or of any other Stable Diffusion or jedi model, by the replacement trick too.
    pub model: String,
    /// Smallest share of the picture's side that the longer side of an instance takes.
    pub min_scale: f64,
    /// Largest such share.
    pub max_scale: f64,
    /// Share of the room around an instance in which it stands anywhere; 0: in the middle of the picture. Models that know only
    /// things in the middle paint another one there beside an instance at the border.
    pub wander: f64,
    /// Denoising steps.
    pub steps: usize,
    /// Times that a scene is painted by the replacement trick, each time but the first from the last result under new noise: what
    /// does not fit the instance goes (a model for inpainting knows it from the beginning and paints once).
    pub rounds: usize,
    /// How deep under noise they begin again, as a share of the noise schedule; 1: all noise.
    pub rounds_from: f64,
    /// Guidance scale.
    pub guidance: f64,
    /// How one noise level follows another.
    pub sampler: SamplerName,
    /// Side of the pictures in pixels; 0: what the model was made for.
    pub size: usize,
}

impl Default for ComposeSettings {
    fn default() -> Self {
        let sampler = SamplerName::default();
        Self {
            model: "toybox".into(),
            min_scale: 0.62,
            max_scale: 0.78,
            wander: 0.6,
            steps: 10,
            rounds: 4,
            rounds_from: 0.6,
            guidance: 2.0,
            sampler,
            size: 0,
        }
    }
}

/// Nothing is known there.
const EMPTY: Rgb<u8> = Rgb([127; 3]);

/// Pastes and paints.
pub fn run(settings: &ComposeSettings, common: &Common, tools: &mut Tools, drafts: &mut [Draft]) -> Result<()> {
    let patience = Patience::with(common, drafts);
    let name = tools.compose.model.name.clone();
    let tool = tools.compose.get()?;
    let side = tool.size();
    ensure!(side > 0, "{name}: paints pictures without pixels");
    let places = pictures_of(drafts);
    let mut pasted = vec![];
    for &(draft_idx, set_idx, picture_idx) in &places {
        let draft = &mut drafts[draft_idx];
        // The index of a picture in its draft, so that no two pictures share random numbers.
        let mut rng = draft.rng(&format!("synth compose {set_idx} {picture_idx}"));
        let scene_idx = set_idx * common.max_images + picture_idx;
        let scene = draft.record.prompts.as_ref().and_then(|prompts| prompts.scenes.get(scene_idx)).cloned();
        let record = &mut draft.record.sets[set_idx].pictures[picture_idx];
        let cutout = &draft.cutouts[record.instance];
        record.prompt = scene.unwrap_or_default();
        record.area = place(settings, cutout, side, &mut rng);
        record.seed = rng.next_u64();
        pasted.push((Pasted::new(cutout, record.area, side), record.prompt.clone(), record.seed));
    }
    let asks: Vec<InpaintAsk> = pasted
        .iter()
        .map(|(pasted, prompt, seed)| InpaintAsk { image: &pasted.image, known: &pasted.mask, prompt, seed: *seed })
        .collect();
    let painted = answers(&name, patience, &asks, &mut |asks| tool.inpainted(asks))?;
    for draft in drafts.iter_mut().filter(|draft| draft.is_alive()) {
        draft.pictures = vec![vec![]; draft.record.sets.len()];
    }
    for ((&(draft_idx, set_idx, _), (pasted, ..)), answer) in places.iter().zip(&pasted).zip(painted) {
        let draft = &mut drafts[draft_idx];
        match answer {
            Ok(scene) if scene.dimensions() == (side, side) => {
                draft.pictures[set_idx].push(Picture { image: pasted.over(&scene), mask: pasted.mask.clone() });
            }
            Ok(scene) => {
                let detail = format!("{}×{} pixels instead of {side}×{side}", scene.width(), scene.height());
                draft.reject(Stage::Compose, "the model failed", Some(detail));
            }
            Err(error) => draft.reject(Stage::Compose, "the model failed", Some(format!("{error:#}"))),
        }
    }
    Ok(())
}

/// A random size and place, wholly inside the picture.
fn place(settings: &ComposeSettings, cutout: &Cutout, side: u32, rng: &mut Rng) -> Area {
    let (width, height) = cutout.image.dimensions();
    let share = rng.between(settings.min_scale, settings.max_scale);
    let factor = share * f64::from(side) / f64::from(width.max(height));
    let scaled = |length: u32| ((f64::from(length) * factor).round() as u32).clamp(1, side);
    let (width, height) = (scaled(width), scaled(height));
    let mut start = |length: u32| {
        let room = side - length;
        let used = (settings.wander * f64::from(room)).round() as u32;
        (room - used) / 2 + rng.below(used as usize + 1) as u32
    };
    let (left, top) = (start(width), start(height));
    Area { left, top, width, height }
}

/// An instance in an otherwise empty picture.
struct Pasted {
    image: RgbImage,
    mask: GrayImage,
}

impl Pasted {
    fn new(cutout: &Cutout, area: Area, side: u32) -> Self {
        let thing = scaled(cutout, area.width, area.height);
        let mut image = RgbImage::from_pixel(side, side, EMPTY);
        let mut mask = GrayImage::new(side, side);
        for (x, y, Rgba([red, green, blue, alpha])) in thing.enumerate_pixels() {
            let (x, y) = (area.left + x, area.top + y);
            // Where the edge is half transparent the picture shows the thing's own colour: the grey stays outside.
            if *alpha > 0 {
                image.put_pixel(x, y, Rgb([*red, *green, *blue]));
            }
            mask.put_pixel(x, y, Luma([*alpha]));
        }
        Self { image, mask }
    }

    /// The thing, pixel by pixel, before a scene.
    fn over(&self, scene: &RgbImage) -> RgbImage {
        RgbImage::from_fn(scene.width(), scene.height(), |x, y| {
            let alpha = u32::from(self.mask.get_pixel(x, y).0[0]);
            let (thing, behind) = (self.image.get_pixel(x, y).0, scene.get_pixel(x, y).0);
            let mix = |c: usize| (u32::from(thing[c]) * alpha + u32::from(behind[c]) * (255 - alpha) + 127) / 255;
            Rgb([mix(0) as u8, mix(1) as u8, mix(2) as u8])
        })
    }
}

/// The cut-out at another size. Colours are weighed by the mask, so that the old background does not bleed in.
fn scaled(cutout: &Cutout, width: u32, height: u32) -> RgbaImage {
    let weighed =
        image::ImageBuffer::<Rgba<f32>, Vec<f32>>::from_fn(cutout.image.width(), cutout.image.height(), |x, y| {
            let alpha = f32::from(cutout.mask.get_pixel(x, y).0[0]) / 255.0;
            let [red, green, blue] = cutout.image.get_pixel(x, y).0.map(|value| f32::from(value) / 255.0 * alpha);
            Rgba([red, green, blue, alpha])
        });
    let small = imageops::resize(&weighed, width, height, imageops::FilterType::Triangle);
    RgbaImage::from_fn(width, height, |x, y| {
        let Rgba([red, green, blue, alpha]) = *small.get_pixel(x, y);
        let colour = |value: f32| if alpha > 0.0 { (255.0 * value / alpha).round().clamp(0.0, 255.0) as u8 } else { 0 };
        Rgba([colour(red), colour(green), colour(blue), (255.0 * alpha).round().clamp(0.0, 255.0) as u8])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A red disc on green ground.
    fn disc() -> Cutout {
        let inside = |x: u32, y: u32| (x as f32 - 19.5).powi(2) + (y as f32 - 19.5).powi(2) < 380.0;
        Cutout {
            image: RgbImage::from_fn(40, 40, |x, y| if inside(x, y) { Rgb([200, 0, 0]) } else { Rgb([0, 255, 0]) }),
            mask: GrayImage::from_fn(40, 40, |x, y| Luma([if inside(x, y) { 255 } else { 0 }])),
        }
    }

    #[test]
    fn things_lie_inside_in_the_asked_sizes_everywhere() {
        let anywhere = ComposeSettings { min_scale: 0.25, max_scale: 0.5, wander: 1.0, ..ComposeSettings::default() };
        let mut rng = Rng::new(1, "compose test", 0);
        let mut areas = |settings: &ComposeSettings| -> Vec<Area> {
            (0..400).map(|_| place(settings, &disc(), 64, &mut rng)).collect()
        };
        let still = areas(&ComposeSettings { wander: 0.0, ..anywhere.clone() });
        assert!(still.iter().all(|a| (2 * a.left + a.width).abs_diff(64) <= 1 && a.left == a.top));
        let near = areas(&ComposeSettings { wander: 0.5, ..anywhere.clone() });
        let farthest = near.iter().map(|a| (2 * a.left + a.width).abs_diff(64)).max();
        assert!((20..=25).contains(&farthest.unwrap()), "{farthest:?}: half of at most 48 pixels of room");
        let areas = areas(&anywhere);
        assert!(areas.iter().all(|a| a.left + a.width <= 64 && a.top + a.height <= 64));
        assert!(areas.iter().all(|a| (16..=32).contains(&a.width)));
        assert!(areas.iter().any(|a| a.left == 0) && areas.iter().any(|a| a.left + a.width == 64));
    }

    #[test]
    fn the_old_ground_does_not_bleed_into_the_new_scene() {
        let pasted = Pasted::new(&disc(), Area { left: 5, top: 9, width: 17, height: 17 }, 32);
        let scene = RgbImage::from_pixel(32, 32, Rgb([0, 0, 255]));
        let picture = pasted.over(&scene);
        assert_eq!(picture.get_pixel(13, 17).0, [200, 0, 0]);
        assert_eq!(picture.get_pixel(1, 1).0, [0, 0, 255]);
        assert!(picture.pixels().all(|pixel| pixel.0[1] == 0), "green of the old ground");
    }
}
