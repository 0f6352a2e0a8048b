//! The twelve places, painted in the unit square with y downwards.

use super::paint::{Canvas, Colour, ellipse, polygon, rectangle};
use crate::rng::Rng;

/// The places that captions name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Their names say it.
pub enum Scene {
    Beach,
    Snow,
    Space,
    CityNight,
    UnderWater,
    Desert,
    Meadow,
    Forest,
    Sunset,
    LivingRoom,
    Rain,
    Volcano,
}

impl Scene {
    /// In the order of their numbers.
    pub const ALL: [Scene; 12] = [
        Scene::Beach,
        Scene::Snow,
        Scene::Space,
        Scene::CityNight,
        Scene::UnderWater,
        Scene::Desert,
        Scene::Meadow,
        Scene::Forest,
        Scene::Sunset,
        Scene::LivingRoom,
        Scene::Rain,
        Scene::Volcano,
    ];

    /// As it stands in a caption.
    pub fn phrase(self) -> &'static str {
        match self {
            Scene::Beach => "on the beach",
            Scene::Snow => "in the snow",
            Scene::Space => "in space",
            Scene::CityNight => "in the city at night",
            Scene::UnderWater => "under water",
            Scene::Desert => "in the desert",
            Scene::Meadow => "in a meadow",
            Scene::Forest => "in the forest",
            Scene::Sunset => "at sunset",
            Scene::LivingRoom => "in a living room",
            Scene::Rain => "in the rain",
            Scene::Volcano => "on a volcano",
        }
    }
}

const fn rgb(r: u8, g: u8, b: u8) -> Colour {
    Colour::new(r, g, b)
}

/// Paints the whole unit square.
pub fn paint(canvas: &mut Canvas, scene: Scene, rng: &mut Rng) {
    let horizon = rng.between(0.52, 0.66) as f32;
    let u = |low: f64, high: f64, rng: &mut Rng| rng.between(low, high) as f32;
    match scene {
        Scene::Beach => {
            sky(canvas, rgb(120, 200, 250), rgb(190, 230, 252), horizon, rng);
            canvas.fill(&ellipse(u(0.1, 0.9, rng), 0.14, 0.1, 0.1), rgb(255, 240, 150));
            band(canvas, rgb(30, 130, 210), horizon - 0.16, horizon + 0.02, rng);
            band(canvas, rgb(240, 250, 252), horizon, horizon + 0.035, rng);
            band(canvas, rgb(245, 222, 150), horizon + 0.03, 1.0, rng);
        }
        Scene::Snow => {
            sky(canvas, rgb(150, 175, 205), rgb(205, 220, 235), horizon, rng);
            for x in [0.18, 0.82] {
                fir(canvas, x + u(-0.1, 0.1, rng), horizon + 0.03, 0.3, rgb(70, 120, 120));
            }
            band(canvas, rgb(248, 251, 255), horizon, 1.0, rng);
            speckle(canvas, rgb(255, 255, 255), 26, (0.010, 0.022), 1.0, rng);
        }
        Scene::Space => {
            sky(canvas, rgb(10, 8, 30), rgb(24, 14, 56), 1.0, rng);
            speckle(canvas, rgb(255, 250, 230), 30, (0.006, 0.014), 1.0, rng);
            let (x, y) = (u(0.12, 0.88, rng), u(0.1, 0.25, rng));
            canvas.fill(&ellipse(x, y, 0.11, 0.11), rgb(222, 150, 90).jitter(rng, 25.0));
            canvas.stroke(&ellipse(x, y, 0.19, 0.045), rgb(240, 215, 170), 0.02);
        }
        Scene::CityNight => {
            sky(canvas, rgb(22, 24, 66), rgb(62, 48, 110), horizon + 0.2, rng);
            let mut x = -0.05;
            while x < 1.0 {
                let (width, top) = (u(0.14, 0.24, rng), u(0.12, 0.42, rng));
                canvas.fill(&rectangle(x, top, x + width, 0.9), rgb(34, 34, 60).jitter(rng, 8.0));
                for row in 0..6 {
                    for column in 0..2 {
                        if rng.chance(0.6) {
                            let (wx, wy) = (x + width * (0.2 + 0.4 * column as f32), top + 0.05 + 0.085 * row as f32);
                            canvas.fill(&rectangle(wx, wy, wx + width * 0.22, wy + 0.045), rgb(252, 214, 90));
                        }
                    }
                }
                x += width + u(0.0, 0.04, rng);
            }
            band(canvas, rgb(58, 58, 72), horizon + 0.14, 1.0, rng);
        }
        Scene::UnderWater => {
            sky(canvas, rgb(40, 160, 200), rgb(10, 60, 120), 1.0, rng);
            for _ in 0..3 {
                let x = u(0.05, 0.95, rng);
                let sway = u(-0.08, 0.08, rng);
                canvas.fill(&polygon(&[(x - 0.04, 1.0), (x + sway, 0.55), (x + 0.04, 1.0)]), rgb(40, 150, 90));
            }
            band(canvas, rgb(196, 180, 130), 0.88, 1.0, rng);
            for _ in 0..9 {
                let r = u(0.015, 0.035, rng);
                canvas.stroke(&ellipse(u(0.0, 1.0, rng), u(0.0, 0.85, rng), r, r), rgb(190, 235, 250), 0.012);
            }
        }
        Scene::Desert => {
            sky(canvas, rgb(250, 196, 110), rgb(254, 226, 160), horizon, rng);
            canvas.fill(&ellipse(u(0.1, 0.9, rng), 0.16, 0.09, 0.09), rgb(255, 250, 215));
            let x = u(0.0, 1.0, rng);
            canvas.fill(&ellipse(x, horizon + 0.14, 0.5, 0.24), rgb(222, 150, 70));
            band(canvas, rgb(206, 130, 56), horizon + 0.07, 1.0, rng);
        }
        Scene::Meadow => {
            sky(canvas, rgb(130, 205, 255), rgb(205, 236, 255), horizon, rng);
            for _ in 0..2 {
                let (x, y) = (u(0.1, 0.9, rng), u(0.08, 0.26, rng));
                for (dx, r) in [(-0.08, 0.05), (0.0, 0.07), (0.08, 0.05)] {
                    canvas.fill(&ellipse(x + dx, y, r, r * 0.8), rgb(255, 255, 255));
                }
            }
            band(canvas, rgb(98, 190, 70), horizon, 1.0, rng);
            for _ in 0..9 {
                let (x, y) = (u(0.0, 1.0, rng), u(horizon as f64 + 0.06, 0.98, rng));
                let petal = *rng.pick(&[rgb(255, 255, 255), rgb(255, 225, 70), rgb(250, 120, 160)]);
                canvas.fill(&ellipse(x, y, 0.024, 0.024), petal);
            }
        }
        Scene::Forest => {
            sky(canvas, rgb(90, 140, 100), rgb(150, 185, 130), horizon, rng);
            let mut x = u(0.0, 0.1, rng);
            while x < 1.05 {
                canvas.fill(&rectangle(x - 0.03, 0.2, x + 0.03, horizon + 0.1), rgb(96, 64, 40));
                fir(canvas, x, u(0.5, 0.58, rng), u(0.46, 0.6, rng), rgb(26, 92, 52).jitter(rng, 12.0));
                x += u(0.2, 0.28, rng);
            }
            band(canvas, rgb(74, 96, 44), horizon + 0.06, 1.0, rng);
        }
        Scene::Sunset => {
            sky(canvas, rgb(120, 60, 130), rgb(255, 130, 80), horizon, rng);
            canvas.fill(&ellipse(u(0.2, 0.8, rng), horizon - 0.06, 0.17, 0.17), rgb(255, 226, 120));
            band(canvas, rgb(92, 44, 84), horizon, 1.0, rng);
        }
        Scene::LivingRoom => {
            let wall = rgb(226, 196, 170).jitter(rng, 8.0);
            sky(canvas, wall, wall, 1.0, rng);
            let x = *rng.pick(&[0.06f32, 0.62]);
            canvas.fill(&rectangle(x, 0.08, x + 0.32, 0.36), rgb(250, 250, 250));
            canvas.fill(&rectangle(x + 0.03, 0.11, x + 0.29, 0.33), rgb(140, 206, 245));
            canvas.fill(&rectangle(x + 0.15, 0.11, x + 0.17, 0.33), rgb(250, 250, 250));
            band(canvas, rgb(150, 96, 58), horizon + 0.08, 1.0, rng);
            canvas.fill(&ellipse(0.5, 0.92, 0.46, 0.12), rgb(186, 60, 70));
        }
        Scene::Rain => {
            sky(canvas, rgb(96, 106, 122), rgb(140, 150, 164), horizon, rng);
            for _ in 0..3 {
                canvas.fill(&ellipse(u(0.0, 1.0, rng), u(0.0, 0.12, rng), 0.24, 0.09), rgb(70, 78, 94));
            }
            band(canvas, rgb(84, 96, 104), horizon, 1.0, rng);
            canvas.fill(&ellipse(u(0.2, 0.8, rng), 0.93, 0.3, 0.05), rgb(150, 170, 190));
            for _ in 0..22 {
                let (x, y) = (u(0.0, 1.0, rng), u(0.0, 0.95, rng));
                canvas.stroke(&super::paint::curve((x, y), (x, y), (x - 0.025, y + 0.09)), rgb(196, 214, 236), 0.012);
            }
        }
        Scene::Volcano => {
            sky(canvas, rgb(70, 20, 24), rgb(150, 44, 30), horizon, rng);
            let x = u(0.25, 0.75, rng);
            canvas.fill(
                &polygon(&[(x - 0.5, horizon + 0.1), (x - 0.1, 0.16), (x + 0.1, 0.16), (x + 0.5, horizon + 0.1)]),
                rgb(58, 46, 50),
            );
            canvas.fill(
                &polygon(&[(x - 0.1, 0.16), (x + 0.1, 0.16), (x + 0.06, 0.4), (x, 0.28), (x - 0.05, 0.46)]),
                rgb(255, 140, 30),
            );
            band(canvas, rgb(44, 36, 40), horizon + 0.05, 1.0, rng);
            for _ in 0..4 {
                let (x, y) = (u(0.0, 1.0, rng), u(0.78, 0.98, rng));
                canvas.fill(&ellipse(x, y, 0.1, 0.022), rgb(255, 112, 24));
            }
        }
    }
}

/// Fills from the top to `bottom` in six bands from one colour to the other, and the rest with the second.
fn sky(canvas: &mut Canvas, top: Colour, bottom: Colour, height: f32, rng: &mut Rng) {
    let (top, bottom) = (top.jitter(rng, 8.0), bottom.jitter(rng, 8.0));
    const STEPS: usize = 6;
    for step in 0..STEPS {
        let share = step as f32 / (STEPS - 1) as f32;
        let mix = |a: u8, b: u8| (a as f32 + (b as f32 - a as f32) * share) as u8;
        let colour = Colour::new(mix(top.red, bottom.red), mix(top.green, bottom.green), mix(top.blue, bottom.blue));
        canvas.fill(&rectangle(0.0, height * step as f32 / STEPS as f32, 1.0, 1.0), colour);
    }
}

fn band(canvas: &mut Canvas, colour: Colour, top: f32, bottom: f32, rng: &mut Rng) {
    canvas.fill(&rectangle(0.0, top, 1.0, bottom), colour.jitter(rng, 8.0));
}

fn fir(canvas: &mut Canvas, x: f32, foot: f32, height: f32, colour: Colour) {
    for (share, width) in [(0.0, 0.34), (0.3, 0.27), (0.6, 0.2)] {
        let base = foot - height * share;
        let half = height * width;
        canvas.fill(&polygon(&[(x - half, base), (x, base - height * 0.45), (x + half, base)]), colour);
    }
}

fn speckle(canvas: &mut Canvas, colour: Colour, count: usize, radius: (f64, f64), bottom: f64, rng: &mut Rng) {
    for _ in 0..count {
        let r = rng.between(radius.0, radius.1) as f32;
        let (x, y) = (rng.uniform() as f32, rng.between(0.0, bottom) as f32);
        canvas.fill(&ellipse(x, y, r, r), colour);
    }
}
