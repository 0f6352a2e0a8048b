//! A thin layer over tiny-skia: colours and filled shapes in a local frame.

use tiny_skia::{
    Color, FillRule, LineCap, LineJoin, Mask, Paint, Path, PathBuilder, Pixmap, Rect, Shader, Stroke, Transform,
};

/// An opaque colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Colour {
    pub red: u8,
    pub green: u8,
    pub blue: u8,
}

impl Colour {
    pub const fn new(red: u8, green: u8, blue: u8) -> Self {
        Self { red, green, blue }
    }

    /// Towards black (negative) or white (positive) by this share.
    pub fn shade(self, by: f32) -> Self {
        let target = if by < 0.0 { 0.0 } else { 255.0 };
        let mix = |v: u8| (v as f32 + (target - v as f32) * by.abs()).round() as u8;
        Self::new(mix(self.red), mix(self.green), mix(self.blue))
    }

    /// Channels jittered by up to `amount` steps each from one draw in [0, 1) a channel.
    pub fn jitter(self, rng: &mut crate::rng::Rng, amount: f64) -> Self {
        let mut channel = |v: u8| (v as f64 + rng.between(-amount, amount)).clamp(0.0, 255.0) as u8;
        Self::new(channel(self.red), channel(self.green), channel(self.blue))
    }

    fn opaque(self, alpha: f32) -> Color {
        let unit = |v: u8| v as f32 / 255.0;
        Color::from_rgba(unit(self.red), unit(self.green), unit(self.blue), alpha).unwrap_or(Color::BLACK)
    }
}

/// A picture being painted through a transform.
pub struct Canvas {
    pub pixmap: Pixmap,
    pub transform: Transform,
    clip: Option<Mask>,
}

impl Canvas {
    /// A transparent square of `size` pixels; `transform` maps the local frame to pixels.
    pub fn new(size: u32, transform: Transform) -> Self {
        let pixmap = Pixmap::new(size.max(1), size.max(1)).expect("a side of at least one pixel");
        Self { pixmap, transform, clip: None }
    }

    pub fn fill(&mut self, path: &Path, colour: Colour) {
        self.fill_alpha(path, colour, 1.0);
    }

    pub fn fill_alpha(&mut self, path: &Path, colour: Colour, alpha: f32) {
        let paint = paint(Shader::SolidColor(colour.opaque(alpha)));
        self.pixmap.fill_path(path, &paint, FillRule::Winding, self.transform, self.clip.as_ref());
    }

    pub fn stroke(&mut self, path: &Path, colour: Colour, width: f32) {
        let paint = paint(Shader::SolidColor(colour.opaque(1.0)));
        let stroke = Stroke { width, line_cap: LineCap::Round, line_join: LineJoin::Round, ..Stroke::default() };
        self.pixmap.stroke_path(path, &paint, &stroke, self.transform, self.clip.as_ref());
    }

    /// Everything until the next call stays inside `path`; None lifts the limit.
    pub fn clip(&mut self, path: Option<&Path>) {
        self.clip = path.and_then(|path| {
            let mut mask = Mask::new(self.pixmap.width(), self.pixmap.height())?;
            mask.fill_path(path, FillRule::Winding, true, self.transform);
            Some(mask)
        });
    }
}

fn paint(shader: Shader) -> Paint {
    Paint { shader, anti_alias: true, ..Paint::default() }
}

pub fn ellipse(x: f32, y: f32, rx: f32, ry: f32) -> Path {
    let rect = Rect::from_ltrb(x - rx.abs(), y - ry.abs(), x + rx.abs(), y + ry.abs());
    PathBuilder::from_oval(rect.expect("an ellipse has an extent")).expect("an ellipse is a path")
}

pub fn polygon(points: &[(f32, f32)]) -> Path {
    let mut builder = PathBuilder::new();
    for (i, &(x, y)) in points.iter().enumerate() {
        if i == 0 { builder.move_to(x, y) } else { builder.line_to(x, y) }
    }
    builder.close();
    builder.finish().expect("a polygon has points")
}

pub fn rectangle(x0: f32, y0: f32, x1: f32, y1: f32) -> Path {
    polygon(&[(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
}

/// A rectangle with corners of radius `r`.
pub fn rounded(x0: f32, y0: f32, x1: f32, y1: f32, r: f32) -> Path {
    let mut b = PathBuilder::new();
    b.move_to(x0 + r, y0);
    b.line_to(x1 - r, y0);
    b.quad_to(x1, y0, x1, y0 + r);
    b.line_to(x1, y1 - r);
    b.quad_to(x1, y1, x1 - r, y1);
    b.line_to(x0 + r, y1);
    b.quad_to(x0, y1, x0, y1 - r);
    b.line_to(x0, y0 + r);
    b.quad_to(x0, y0, x0 + r, y0);
    b.close();
    b.finish().expect("a rounded rectangle is a path")
}

/// An open curve from a to b bent towards c.
pub fn curve(a: (f32, f32), c: (f32, f32), b: (f32, f32)) -> Path {
    let mut builder = PathBuilder::new();
    builder.move_to(a.0, a.1);
    builder.quad_to(c.0, c.1, b.0, b.1);
    builder.finish().expect("a curve is a path")
}
