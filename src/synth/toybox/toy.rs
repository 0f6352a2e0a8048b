//! The toy itself, painted around the origin: it reaches from −1 to 1 vertically, y downwards.

use tiny_skia::Path;

use super::paint::{Canvas, Colour, curve, ellipse, polygon, rectangle, rounded};
use super::subject::{Eyes, Kind, Pattern, Subject, Topper};

/// Where the patterned body, the face and the top of the head are.
struct Build {
    body: Path,
    /// Left, top, right, bottom of the body.
    extent: [f32; 4],
    face: (f32, f32),
    /// Distance of the eyes from the face's middle.
    eye_spread: f32,
    head: (f32, f32),
    head_width: f32,
}

pub fn paint(canvas: &mut Canvas, subject: &Subject) {
    let outline = subject.body.shade(-0.55);
    let build = build(subject);
    limbs(canvas, subject);
    topper(canvas, subject, &build);
    canvas.fill(&build.body, subject.body);
    canvas.clip(Some(&build.body));
    pattern(canvas, subject, build.extent);
    // A soft light from the upper left, a soft shade at the foot.
    let [left, top, right, bottom] = build.extent;
    let (width, height) = (right - left, bottom - top);
    let light = ellipse(left + 0.3 * width, top + 0.22 * height, 0.2 * width, 0.12 * height);
    canvas.fill_alpha(&light, Colour::new(255, 255, 255), 0.35);
    canvas.fill_alpha(&rectangle(left, bottom - 0.12 * height, right, bottom), Colour::new(0, 0, 0), 0.18);
    canvas.clip(None);
    canvas.stroke(&build.body, outline, 0.055);
    eyes(canvas, subject, &build);
}

fn build(subject: &Subject) -> Build {
    let a = subject.aspect;
    let with = |body: Path, extent: [f32; 4], face: (f32, f32), head: (f32, f32)| Build {
        body,
        extent,
        face,
        eye_spread: 0.2 * a,
        head,
        head_width: 0.36 * a,
    };
    match subject.kind {
        Kind::Robot => with(
            rounded(-0.58 * a, -0.62, 0.58 * a, 0.62, 0.14),
            [-0.58 * a, -0.62, 0.58 * a, 0.62],
            (0.0, -0.26),
            (0.0, -0.6),
        ),
        Kind::Cat => {
            with(ellipse(0.0, 0.06, 0.66 * a, 0.66), [-0.66 * a, -0.6, 0.66 * a, 0.72], (0.0, -0.14), (0.0, -0.5))
        }
        Kind::Bird => with(
            ellipse(-0.05, 0.0, 0.62 * a, 0.56),
            [-0.67 * a, -0.56, 0.57 * a, 0.56],
            (0.22 * a, -0.2),
            (0.08, -0.48),
        ),
        Kind::Mug => with(
            rounded(-0.58 * a, -0.56, 0.5 * a, 0.66, 0.1),
            [-0.58 * a, -0.56, 0.5 * a, 0.66],
            (-0.04, -0.12),
            (-0.04, -0.54),
        ),
        Kind::Car => {
            let body = polygon(&[
                (-0.92 * a, 0.5),
                (-0.92 * a, 0.06),
                (-0.52 * a, -0.02),
                (-0.34 * a, -0.48),
                (0.36 * a, -0.48),
                (0.56 * a, -0.02),
                (0.92 * a, 0.08),
                (0.92 * a, 0.5),
            ]);
            with(body, [-0.92 * a, -0.48, 0.92 * a, 0.5], (0.02, -0.18), (0.0, -0.46))
        }
        Kind::Cactus => with(
            rounded(-0.36 * a, -0.68, 0.36 * a, 0.56, 0.34 * a),
            [-0.36 * a, -0.68, 0.36 * a, 0.56],
            (0.0, -0.22),
            (0.0, -0.64),
        ),
        Kind::Lamp => {
            let body = polygon(&[(-0.36 * a, -0.62), (0.36 * a, -0.62), (0.74 * a, 0.2), (-0.74 * a, 0.2)]);
            with(body, [-0.74 * a, -0.62, 0.74 * a, 0.2], (0.0, -0.16), (0.0, -0.6))
        }
        Kind::Fish => with(
            ellipse(0.12, 0.06, 0.68 * a, 0.5),
            [0.12 - 0.68 * a, -0.44, 0.12 + 0.68 * a, 0.56],
            (0.4 * a, -0.06),
            (0.12, -0.4),
        ),
        Kind::House => with(
            rectangle(-0.62 * a, -0.2, 0.62 * a, 0.86),
            [-0.62 * a, -0.2, 0.62 * a, 0.86],
            (0.0, 0.14),
            (0.0, -0.66),
        ),
        Kind::Rocket => {
            with(ellipse(0.0, -0.06, 0.4 * a, 0.78), [-0.4 * a, -0.84, 0.4 * a, 0.72], (0.0, -0.3), (0.0, -0.78))
        }
        Kind::Mushroom => {
            let body = polygon(&dome(0.84 * a, 0.02, 0.74));
            with(body, [-0.84 * a, -0.72, 0.84 * a, 0.02], (0.0, 0.36), (0.0, -0.68))
        }
        Kind::Teapot => {
            with(ellipse(0.0, 0.14, 0.6 * a, 0.54), [-0.6 * a, -0.4, 0.6 * a, 0.68], (0.0, 0.0), (0.0, -0.38))
        }
    }
}

/// The upper half of an ellipse over y = `foot`.
fn dome(rx: f32, foot: f32, ry: f32) -> Vec<(f32, f32)> {
    (0..=24)
        .map(|i| {
            let angle = std::f32::consts::PI * i as f32 / 24.0;
            (-rx * angle.cos(), foot - ry * angle.sin())
        })
        .collect()
}

/// Everything in the accent colour: legs, wheels, handles, fins, the stand.
fn limbs(canvas: &mut Canvas, subject: &Subject) {
    let (a, n) = (subject.aspect, subject.limbs);
    let accent = subject.accent;
    let dark = accent.shade(-0.45);
    let mut part = |path: Path| {
        canvas.fill(&path, accent);
        canvas.stroke(&path, dark, 0.045);
    };
    match subject.kind {
        Kind::Robot => {
            for side in [-1.0, 1.0] {
                part(rounded(side * 0.28 * a - 0.13, 0.55, side * 0.28 * a + 0.13, 0.98, 0.06));
                let x = side * (0.58 * a + 0.12 * n);
                part(rounded(x - 0.12 * n, -0.22, x + 0.12 * n, 0.36, 0.1));
            }
        }
        Kind::Cat => {
            for side in [-1.0, 1.0] {
                part(ellipse(side * 0.34 * a, 0.78, 0.2, 0.18 * n));
                part(polygon(&[(side * 0.62 * a, -0.2), (side * 0.56 * a, -0.95), (side * 0.1 * a, -0.52)]));
            }
            part(ellipse(0.7 * a, 0.4, 0.14, 0.3 * n));
        }
        Kind::Bird => {
            part(polygon(&[(0.5 * a, -0.24), (0.5 * a + 0.46 * n, -0.04), (0.48 * a, 0.12)]));
            part(polygon(&[(-0.5 * a, -0.1), (-0.62 * a - 0.4 * n, -0.34), (-0.6 * a - 0.3 * n, 0.2)]));
            for x in [-0.2, 0.14] {
                part(rectangle(x, 0.5, x + 0.1, 0.95));
            }
        }
        Kind::Mug => {
            let handle = ellipse(0.56 * a, 0.04, 0.24 * n + 0.08, 0.32);
            canvas.stroke(&handle, dark, 0.24);
            canvas.stroke(&handle, accent, 0.16);
        }
        Kind::Car => {
            for x in [-0.5 * a, 0.5 * a] {
                part(ellipse(x, 0.56, 0.26 * n.min(1.15), 0.26 * n.min(1.15)));
            }
        }
        Kind::Cactus => {
            part(polygon(&[(-0.5 * a, 0.5), (0.5 * a, 0.5), (0.38 * a, 0.98), (-0.38 * a, 0.98)]));
            for (side, y) in [(-1.0, 0.04), (1.0, -0.16)] {
                part(ellipse(side * (0.36 * a + 0.16 * n), y, 0.2 * n, 0.14));
                part(ellipse(side * (0.4 * a + 0.28 * n), y - 0.18, 0.12, 0.24));
            }
        }
        Kind::Lamp => {
            part(rectangle(-0.08, 0.16, 0.08, 0.9));
            part(ellipse(0.0, 0.9, 0.42 * n, 0.12));
        }
        Kind::Fish => {
            let tail = 0.12 - 0.6 * a;
            part(polygon(&[(tail, 0.06), (tail - 0.42 * n, -0.34), (tail - 0.34 * n, 0.06), (tail - 0.42 * n, 0.46)]));
            part(polygon(&[(-0.1, 0.46), (0.28, 0.5), (0.0, 0.5 + 0.34 * n)]));
            part(polygon(&[(-0.16, -0.36), (0.36, -0.38), (0.0, -0.44 - 0.3 * n)]));
        }
        Kind::House => {
            part(polygon(&[(-0.84 * a, -0.16), (0.0, -0.92), (0.84 * a, -0.16)]));
            part(rectangle(0.34 * a, -0.86, 0.54 * a, -0.4));
        }
        Kind::Rocket => {
            for side in [-1.0, 1.0] {
                part(polygon(&[(side * 0.3 * a, 0.16), (side * (0.46 * a + 0.28 * n), 0.86), (side * 0.18 * a, 0.66)]));
            }
            part(polygon(&[(-0.2, 0.68), (0.0, 1.0), (0.2, 0.68)]));
        }
        Kind::Mushroom => part(rounded(-0.3 * n, -0.04, 0.3 * n, 0.92, 0.12)),
        Kind::Teapot => {
            part(polygon(&[(0.5 * a, 0.3), (0.66 * a + 0.3 * n, -0.3), (0.8 * a + 0.3 * n, -0.22), (0.52 * a, 0.5)]));
            let handle = ellipse(-0.62 * a, 0.12, 0.22 * n + 0.06, 0.28);
            canvas.stroke(&handle, dark, 0.2);
            canvas.stroke(&handle, accent, 0.13);
            let foot = rounded(-0.34 * a, 0.6, 0.34 * a, 0.8, 0.06);
            canvas.fill(&foot, accent);
            canvas.stroke(&foot, dark, 0.045);
        }
    }
}

fn topper(canvas: &mut Canvas, subject: &Subject, build: &Build) {
    let ((x, y), w) = (build.head, build.head_width);
    let colour = subject.accent;
    let dark = colour.shade(-0.45);
    let mut part = |path: Path, colour: Colour| {
        canvas.fill(&path, colour);
        canvas.stroke(&path, dark, 0.045);
    };
    match subject.topper {
        Topper::None => {}
        Topper::PointedEars => {
            for side in [-1.0, 1.0] {
                part(
                    polygon(&[
                        (x + side * w * 1.1, y + 0.2),
                        (x + side * w * 1.2, y - 0.36),
                        (x + side * w * 0.2, y + 0.04),
                    ]),
                    colour,
                );
            }
        }
        Topper::RoundEars => {
            for side in [-1.0, 1.0] {
                part(ellipse(x + side * w, y - 0.06, 0.2, 0.2), colour);
            }
        }
        Topper::TopHat => {
            part(rectangle(x - w * 0.62, y - 0.4, x + w * 0.62, y + 0.04), colour);
            part(rounded(x - w * 1.1, y - 0.08, x + w * 1.1, y + 0.06, 0.05), colour);
        }
        Topper::Antenna => {
            part(rectangle(x - 0.03, y - 0.3, x + 0.03, y + 0.06), dark);
            part(ellipse(x, y - 0.32, 0.13, 0.13), colour);
        }
        Topper::PartyHat => part(polygon(&[(x - w * 0.8, y + 0.06), (x, y - 0.46), (x + w * 0.8, y + 0.06)]), colour),
    }
}

fn pattern(canvas: &mut Canvas, subject: &Subject, [left, top, right, bottom]: [f32; 4]) {
    let colour = subject.second;
    let n = subject.repeats;
    let (width, height) = (right - left, bottom - top);
    let (dx, dy) = (width / n as f32, height / n as f32);
    match subject.pattern {
        Pattern::Plain => {}
        Pattern::Band => canvas.fill(&rectangle(left, top + 0.56 * height, right, top + 0.8 * height), colour),
        Pattern::StripesAcross => {
            for i in 0..n {
                let y = top + (i as f32 + 0.25) * dy;
                canvas.fill(&rectangle(left, y, right, y + dy * 0.5), colour);
            }
        }
        Pattern::StripesDown => {
            for i in 0..n {
                let x = left + (i as f32 + 0.25) * dx;
                canvas.fill(&rectangle(x, top, x + dx * 0.5, bottom), colour);
            }
        }
        Pattern::Diagonals => {
            for i in 0..2 * n {
                let x = left - height + (i as f32 + 0.25) * dx;
                canvas.fill(
                    &polygon(&[(x, bottom), (x + dx * 0.5, bottom), (x + dx * 0.5 + height, top), (x + height, top)]),
                    colour,
                );
            }
        }
        Pattern::Dots => {
            let r = 0.3 * dx.min(dy);
            for row in 0..n {
                for column in 0..=n {
                    let shift = if row % 2 == 0 { 0.5 } else { 0.0 };
                    let (x, y) = (left + (column as f32 + shift) * dx, top + (row as f32 + 0.5) * dy);
                    canvas.fill(&ellipse(x, y, r, r), colour);
                }
            }
        }
        Pattern::Checks => {
            for row in 0..n {
                for column in (row % 2..n).step_by(2) {
                    let (x, y) = (left + column as f32 * dx, top + row as f32 * dy);
                    canvas.fill(&rectangle(x, y, x + dx, y + dy), colour);
                }
            }
        }
    }
}

fn eyes(canvas: &mut Canvas, subject: &Subject, build: &Build) {
    const WHITE: Colour = Colour::new(255, 255, 255);
    const BLACK: Colour = Colour::new(24, 22, 30);
    let (x, y) = build.face;
    let mut eye = |x: f32, r: f32| {
        canvas.fill(&ellipse(x, y, r, r), WHITE);
        canvas.stroke(&ellipse(x, y, r, r), BLACK, 0.03);
        canvas.fill(&ellipse(x + 0.15 * r, y + 0.1 * r, r * 0.55, r * 0.55), BLACK);
    };
    match subject.eyes {
        Eyes::One => eye(x, 0.23),
        Eyes::Two => [-1.0, 1.0].iter().for_each(|side| eye(x + side * build.eye_spread, 0.16)),
        Eyes::Wide => [-1.0, 1.0].iter().for_each(|side| eye(x + side * build.eye_spread * 1.3, 0.19)),
        Eyes::Sleepy => {
            for side in [-1.0, 1.0] {
                let middle = x + side * build.eye_spread * 1.1;
                let lid = curve((middle - 0.14, y), (middle, y + 0.2), (middle + 0.14, y));
                canvas.stroke(&lid, WHITE, 0.13);
                canvas.stroke(&lid, BLACK, 0.07);
            }
        }
    }
    let smile = curve((x - 0.14, y + 0.27), (x, y + 0.4), (x + 0.14, y + 0.27));
    canvas.stroke(&smile, BLACK, 0.05);
}
