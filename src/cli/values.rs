//! What a single flag's value may be: text to value, with the reason when it is refused.

use std::{fmt, path::PathBuf, str::FromStr};

/// A reference picture and, where one was given, its caption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Its file.
    pub image: PathBuf,
    /// `None`: the empty prompt.
    pub caption: Option<String>,
}

impl FromStr for Reference {
    type Err = String;

    /// Splits at the first `=` that follows a picture's suffix, so that folders may have one in their name, or else at
    /// the first one.
    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let after_suffix = [".png=", ".jpg=", ".jpeg=", ".webp=", ".gif="]
            .iter()
            .filter_map(|suffix| lower.find(suffix).map(|at| at + suffix.len() - 1))
            .min();
        let (image, caption) = match after_suffix.or_else(|| text.find('=')) {
            Some(at) => (&text[..at], Some(text[at + 1..].to_owned())),
            None => (text, None),
        };
        if image.is_empty() {
            return Err("no picture is named before `=`; use IMG or IMG=CAPTION".to_owned());
        }
        Ok(Self { image: image.into(), caption })
    }
}

/// A file of adapters, and how many times they are merged into the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// The file.
    pub path: PathBuf,
    /// 1 where none is given.
    pub weight: f64,
}

impl FromStr for Lora {
    type Err = String;

    /// Splits at the last `:` if a number follows it.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<f64>().ok().filter(|weight| weight.is_finite());
        let split = text.rsplit_once(':').and_then(|(path, weight)| Some((path, number(weight)?)));
        let (path, weight) = split.unwrap_or((text, 1.0));
        if path.is_empty() {
            return Err("no file is named; use FILE or FILE:WEIGHT".to_owned());
        }
        Ok(Self { path: path.into(), weight })
    }
}

/// Part `index` of `count`, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// I, from 0.
    pub index: usize,
    /// N.
    pub count: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "use I/N with I below N, such as 0/4".to_owned();
        let (index, count) = text.split_once('/').ok_or_else(wrong)?;
        let index = index.parse().map_err(|_| wrong())?;
        let count = count.parse().map_err(|_| wrong())?;
        if index < count { Ok(Self { index, count }) } else { Err(wrong()) }
    }
}

/// A place in a picture, in pixels from its upper left corner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// To the right.
    pub x: usize,
    /// Down.
    pub y: usize,
}

impl FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "use X,Y in whole pixels, such as 20,40".to_owned();
        let (x, y) = text.split_once(',').ok_or_else(wrong)?;
        let whole = |text: &str| text.trim().parse().map_err(|_| wrong());
        Ok(Self { x: whole(x)?, y: whole(y)? })
    }
}

/// The name of a device; opening it comes later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device(String);

impl Device {
    /// The name as `Runtime::open` takes it.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_gpu = text.strip_prefix("cuda:").is_some_and(|index| index.parse::<u16>().is_ok());
        if is_gpu || ["auto", "cpu", "cuda"].contains(&text) {
            Ok(Self(text.to_owned()))
        } else {
            Err("use auto, cpu, cuda or cuda:N".to_owned())
        }
    }
}

/// A guidance scale: finite, 0 or more.
pub fn scale(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(scale) if scale.is_finite() && scale >= 0.0 => Ok(scale),
        _ => Err("use a number, 0 or more".to_owned()),
    }
}

/// A share: 0 to 1.
pub fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("use a number from 0 to 1".to_owned()),
    }
}

/// A size of files in bytes: a number and B, KB, MB, GB or TB (powers of 1000), KiB, MiB, GiB or TiB (powers of 1024).
pub fn n_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("TIB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let wrong = || "use a number and a unit, such as 5GB or 800MiB".to_owned();
    let upper = text.trim().to_ascii_uppercase();
    let unit = UNITS.iter().find_map(|(unit, factor)| Some((upper.strip_suffix(unit)?, *factor)));
    let (number, factor) = unit.ok_or_else(wrong)?;
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number * factor as f64 >= 1.0 => Ok((number * factor as f64) as u64),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_a_weight_behind_the_last_colon() {
        let parse = |text: &str| text.parse::<Lora>().map(|lora| (lora.path, lora.weight));
        assert_eq!(parse("a.safetensors"), Ok(("a.safetensors".into(), 1.0)));
        assert_eq!(parse("c:/a.safetensors:0.5"), Ok(("c:/a.safetensors".into(), 0.5)));
        assert_eq!(parse("a:b"), Ok(("a:b".into(), 1.0)));
        assert_eq!(parse("a:-1"), Ok(("a".into(), -1.0)));
        assert!(parse("").is_err() && parse(":1").is_err());
    }

    #[test]
    fn a_reference_is_split_at_its_caption() {
        let parse = |text: &str| text.parse::<Reference>().map(|r| (r.image, r.caption));
        assert_eq!(parse("a.png"), Ok(("a.png".into(), None)));
        assert_eq!(parse("a.png=a robot, x=1"), Ok(("a.png".into(), Some("a robot, x=1".into()))));
        assert_eq!(parse("run=3/A.PNG=a robot"), Ok(("run=3/A.PNG".into(), Some("a robot".into()))));
        assert_eq!(parse("picture=a robot"), Ok(("picture".into(), Some("a robot".into()))));
        assert!(parse("=a robot").is_err());
    }

    #[test]
    fn sizes_have_a_unit() {
        assert_eq!(n_bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(n_bytes("1.5 kib"), Ok(1536));
        assert_eq!(n_bytes("300B"), Ok(300));
        for wrong in ["5", "GB", "-1GB", "0MB", "nanGB", "5 apples"] {
            assert!(n_bytes(wrong).is_err(), "{wrong} passed");
        }
    }

    #[test]
    fn a_shard_lies_below_its_count() {
        assert_eq!("2/3".parse(), Ok(Shard { index: 2, count: 3 }));
        for wrong in ["3/3", "0/0", "1", "-1/2", "a/b"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong} passed");
        }
    }

    #[test]
    fn a_point_is_two_whole_numbers() {
        assert_eq!("20, 40".parse(), Ok(Point { x: 20, y: 40 }));
        for wrong in ["20", "-1,3", "1.5,2", "a,b", ""] {
            assert!(wrong.parse::<Point>().is_err(), "{wrong} passed");
        }
    }

    #[test]
    fn devices_and_scales_that_cannot_be_are_refused() {
        for name in ["auto", "cpu", "cuda", "cuda:3"] {
            assert_eq!(name.parse::<Device>().map(|d| d.name().to_owned()), Ok(name.to_owned()));
        }
        assert!("gpu".parse::<Device>().is_err() && "cuda:x".parse::<Device>().is_err());
        assert_eq!(scale("0"), Ok(0.0));
        assert!(scale("-0.5").is_err() && scale("nan").is_err() && scale("inf").is_err());
        assert_eq!(share("0.7"), Ok(0.7));
        assert!(share("1.1").is_err() && share("-0.1").is_err() && share("nan").is_err());
    }
}
