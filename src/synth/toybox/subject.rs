//! Who a toy is: everything that must stay the same from picture to picture.

use std::ops::Range;

use super::paint::Colour;
use crate::rng::Rng;

/// Seeds of the 64 toys kept for evaluation. Kinds go round by seed, so that they are evenly spread.
pub const EVAL_SUBJECTS: Range<u64> = 0..64;

/// The word that captions use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Their names say it.
pub enum Kind {
    Robot,
    Cat,
    Bird,
    Mug,
    Car,
    Cactus,
    Lamp,
    Fish,
    House,
    Rocket,
    Mushroom,
    Teapot,
}

impl Kind {
    /// In the order of their numbers.
    pub const ALL: [Kind; 12] = [
        Kind::Robot,
        Kind::Cat,
        Kind::Bird,
        Kind::Mug,
        Kind::Car,
        Kind::Cactus,
        Kind::Lamp,
        Kind::Fish,
        Kind::House,
        Kind::Rocket,
        Kind::Mushroom,
        Kind::Teapot,
    ];

    /// As captions call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Robot => "robot",
            Kind::Cat => "cat",
            Kind::Bird => "bird",
            Kind::Mug => "mug",
            Kind::Car => "car",
            Kind::Cactus => "cactus",
            Kind::Lamp => "lamp",
            Kind::Fish => "fish",
            Kind::House => "house",
            Kind::Rocket => "rocket",
            Kind::Mushroom => "mushroom",
            Kind::Teapot => "teapot",
        }
    }

    /// "a" or "an".
    pub fn article(self) -> &'static str {
        "a"
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Plain,
    StripesAcross,
    StripesDown,
    Diagonals,
    Dots,
    Checks,
    Band,
}

/// What the toy wears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topper {
    None,
    PointedEars,
    RoundEars,
    TopHat,
    Antenna,
    PartyHat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eyes {
    Two,
    One,
    Wide,
    Sleepy,
}

/// A toy's identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Subject {
    /// What all the rest is drawn from.
    pub seed: u64,
    /// All that a caption tells.
    pub kind: Kind,
    /// Body, pattern, limbs and topper: well apart from one another.
    pub body: Colour,
    /// Of the pattern.
    pub second: Colour,
    /// Of limbs and topper.
    pub accent: Colour,
    /// On the body.
    pub pattern: Pattern,
    /// Repeats of the pattern across the body, 2 or 4.
    pub repeats: usize,
    /// Width over height of the body relative to its kind, 0.85 to 1.2.
    pub aspect: f32,
    /// On its head.
    pub topper: Topper,
    /// How it looks at you.
    pub eyes: Eyes,
    /// Length of legs, wheels or stand relative to the kind's, 0.75 to 1.3.
    pub limbs: f32,
}

/// Hues far enough apart to be told apart in a small picture, each with its lightness and chroma; then white and black.
const PALETTE: [[u8; 3]; 12] = [
    [226, 52, 48],
    [245, 140, 34],
    [250, 212, 50],
    [132, 204, 50],
    [26, 140, 74],
    [40, 196, 190],
    [48, 110, 226],
    [120, 66, 196],
    [236, 92, 178],
    [134, 80, 44],
    [244, 240, 232],
    [52, 52, 66],
];

impl Subject {
    /// The one subject of a seed.
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed, "toybox subject", 0);
        let mut colours = PALETTE;
        rng.shuffle(&mut colours);
        let mut tint = |[r, g, b]: [u8; 3]| {
            let mut channel = |v: u8| (v as f64 + rng.between(-12.0, 12.0)).clamp(0.0, 255.0) as u8;
            Colour::new(channel(r), channel(g), channel(b))
        };
        let (body, second, accent) = (tint(colours[0]), tint(colours[1]), tint(colours[2]));
        use {Eyes::*, Pattern::*};
        Self {
            seed,
            kind: Kind::ALL[(seed % Kind::ALL.len() as u64) as usize],
            body,
            second,
            accent,
            pattern: *rng.pick(&[Plain, StripesAcross, StripesDown, Diagonals, Dots, Checks, Band]),
            repeats: *rng.pick(&[2, 4]),
            aspect: rng.between(0.85, 1.2) as f32,
            topper: *rng.pick(&[
                Topper::None,
                Topper::PointedEars,
                Topper::RoundEars,
                Topper::TopHat,
                Topper::Antenna,
                Topper::PartyHat,
            ]),
            eyes: *rng.pick(&[Two, One, Wide, Sleepy]),
            limbs: rng.between(0.75, 1.3) as f32,
        }
    }
}
