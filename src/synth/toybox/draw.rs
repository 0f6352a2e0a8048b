//! One picture: a scene, the toy's shadow, the toy in its pose.

use image::{GrayImage, RgbImage};
use tiny_skia::{PixmapPaint, Transform};

use super::paint::{Canvas, Colour, ellipse};
use super::{Scene, Subject, scene, toy};
use crate::rng::Rng;

/// Where and how the toy stands.
#[derive(Clone, Copy, Debug)]
pub struct Pose {
    /// Centre, in shares of the picture's side.
    pub x: f32,
    /// From the top, as x from the left.
    pub y: f32,
    /// Half the toy's height in shares of the side.
    pub scale: f32,
    /// Turn about its middle.
    pub degrees: f32,
    /// Left and right exchanged.
    pub mirrored: bool,
}

impl Pose {
    fn random(rng: &mut Rng) -> Self {
        let scale = rng.between(0.27, 0.36);
        let slack = 0.5 - scale;
        Self {
            x: (0.5 + rng.between(-0.7, 0.7) * slack) as f32,
            y: (0.55 + rng.between(-0.5, 0.35) * slack) as f32,
            scale: scale as f32,
            degrees: rng.between(-18.0, 18.0) as f32,
            mirrored: rng.chance(0.5),
        }
    }
}

/// A picture and where the toy is in it (255).
pub struct Picture {
    /// The picture.
    pub image: RgbImage,
    /// 255 where the toy is.
    pub mask: GrayImage,
}

/// Draws `subject` in `scene`, pose and small variations of the scene taken from `rng`; `size` pixels a side.
pub fn draw(subject: &Subject, scene: Scene, rng: &mut Rng, size: u32) -> Picture {
    let pose = Pose::random(rng);
    let side = size as f32;
    let mut background = Canvas::new(size, Transform::from_scale(side, side));
    scene::paint(&mut background, scene, rng);

    let upright =
        Transform::from_translate(pose.x * side, pose.y * side).pre_scale(pose.scale * side, pose.scale * side);
    background.transform = upright;
    background.fill_alpha(&ellipse(0.0, 0.98, 0.75, 0.14), Colour::new(0, 0, 0), 0.28);

    let mirror = if pose.mirrored { -1.0 } else { 1.0 };
    let frame = upright.pre_concat(Transform::from_rotate(pose.degrees)).pre_scale(mirror, 1.0);
    let mut canvas = Canvas::new(size, frame);
    toy::paint(&mut canvas, subject);
    let (toy, mut picture) = (canvas.pixmap, background.pixmap);
    picture.draw_pixmap(0, 0, toy.as_ref(), &PixmapPaint::default(), Transform::identity(), None);

    let image = RgbImage::from_fn(size, size, |x, y| {
        let pixel = picture.pixels()[(y * size + x) as usize].demultiply();
        image::Rgb([pixel.red(), pixel.green(), pixel.blue()])
    });
    let mask = GrayImage::from_fn(size, size, |x, y| image::Luma([toy.pixels()[(y * size + x) as usize].alpha()]));
    Picture { image, mask }
}
