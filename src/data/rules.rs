//! Which samples of a source are dealt, and what becomes of them: captions, filters, cuts.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::captions::CaptionRule;
use super::cut::Cut;

/// The rules of one source. The default takes everything as it is, captions from text files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// Where captions come from.
    pub caption: CaptionRule,
    /// All must let a sample through.
    pub filters: Vec<ScoreFilter>,
    /// Samples with a picture whose shorter side has fewer pixels are passed over; 0: none.
    pub min_side: u32,
    /// Samples with a picture whose longer side is more than so many shorter sides are passed over; 0: none.
    pub max_aspect: f64,
    /// How training pictures vary.
    pub cut: Cut,
}

/// Lets a sample through whose scores lie within bounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreFilter {
    /// Where the score stands in the sample's JSON (`scores.clip`): a number, a list or matrix of numbers (each must lie within
    /// the bounds; a square matrix's diagonal is left out), or the same key in each object of a list.
    pub key: String,
    /// Least similarity: below it the pictures show different things. None: no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Largest similarity: above it one picture is a copy of the other. None: no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

impl Rules {
    /// Why a sample with pictures of these widths and heights and this JSON is passed over; None: it is not.
    pub fn reason_against(&self, sizes: &[(u32, u32)], json: &Value) -> Option<String> {
        for &(width, height) in sizes {
            let (short, long) = (width.min(height), width.max(height));
            if short < self.min_side {
                return Some(format!("{width}×{height} pixels, min_side is {}", self.min_side));
            }
            if self.max_aspect > 0.0 && f64::from(long) > self.max_aspect * f64::from(short) {
                return Some(format!("{width}×{height} pixels, max_aspect is {}", self.max_aspect));
            }
        }
        self.filters.iter().find_map(|filter| filter.reason_against(json))
    }

    /// Whether the JSON of a sample is of use.
    pub fn need_json(&self) -> bool {
        !self.filters.is_empty() || !self.caption.needs_file()
    }
}

impl ScoreFilter {
    fn reason_against(&self, json: &Value) -> Option<String> {
        let mut scores = vec![];
        collect(json, &self.key, &mut scores);
        if scores.is_empty() {
            return Some(format!("its JSON has no score {}", self.key));
        }
        let (min, max) = (self.min.unwrap_or(f64::NEG_INFINITY), self.max.unwrap_or(f64::INFINITY));
        // Not `x < min || x > max`, which would let NaN through.
        let outside = scores.into_iter().find(|score| !(min..=max).contains(score))?;
        Some(if outside > max {
            format!("{} {outside} is above {max}", self.key)
        } else {
            format!("{} {outside} is below {min}", self.key)
        })
    }
}

/// The numbers at `path`, which goes through the objects of a list.
fn collect(json: &Value, path: &str, scores: &mut Vec<f64>) {
    if let (Value::Array(items), false) = (json, path.is_empty()) {
        return items.iter().for_each(|item| collect(item, path, scores));
    }
    if !path.is_empty() {
        let (name, rest) = path.split_once('.').unwrap_or((path, ""));
        return json.get(name).into_iter().for_each(|value| collect(value, rest, scores));
    }
    match json {
        Value::Number(number) => scores.extend(number.as_f64()),
        Value::Array(rows) => {
            let is_square =
                rows.len() > 1 && rows.iter().all(|row| row.as_array().is_some_and(|r| r.len() == rows.len()));
            for (idx, row) in rows.iter().enumerate() {
                match row.as_array().filter(|_| is_square) {
                    Some(row) => {
                        let others = row.iter().enumerate().filter(|(column, _)| *column != idx);
                        others.for_each(|(_, value)| collect(value, "", scores));
                    }
                    None => collect(row, "", scores),
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reason(key: &str, json: &Value) -> Option<String> {
        let filter = ScoreFilter { key: key.into(), min: Some(0.5), max: Some(0.9) };
        Rules { filters: vec![filter], ..Rules::default() }.reason_against(&[], json)
    }

    #[test]
    fn scores_below_and_above_the_bounds_are_told() {
        assert_eq!(reason("s", &json!({"s": 0.7})), None);
        assert_eq!(reason("s", &json!({"s": [0.5, 0.9]})), None);
        assert_eq!(reason("s", &json!({"s": [0.5, 0.91]})).unwrap(), "s 0.91 is above 0.9");
        assert_eq!(reason("a.s", &json!({"a": {"s": 0.4}})).unwrap(), "a.s 0.4 is below 0.5");
        assert_eq!(reason("s", &json!({"t": 1})).unwrap(), "its JSON has no score s");
        assert_eq!(reason("s", &Value::Null).unwrap(), "its JSON has no score s");
        assert_eq!(reason("s", &json!({"s": "0.7"})).unwrap(), "its JSON has no score s");
    }

    #[test]
    fn a_picture_is_not_compared_with_itself() {
        assert_eq!(reason("s", &json!({"s": [[1.0, 0.7], [0.7, 1.0]]})), None);
        assert_eq!(reason("s", &json!({"s": [[1.0, 0.95], [0.95, 1.0]]})).unwrap(), "s 0.95 is above 0.9");
        assert_eq!(
            reason("pairs.clip", &json!({"pairs": [{"clip": 0.7}, {"clip": 0.2}]})).unwrap(),
            "pairs.clip 0.2 is below 0.5"
        );
    }

    #[test]
    fn pictures_that_are_too_small_or_too_long_are_told() {
        let rules = Rules { min_side: 256, max_aspect: 2.0, ..Rules::default() };
        assert_eq!(rules.reason_against(&[(256, 256), (512, 256)], &Value::Null), None);
        assert_eq!(rules.reason_against(&[(300, 255)], &Value::Null).unwrap(), "300×255 pixels, min_side is 256");
        assert_eq!(rules.reason_against(&[(256, 513)], &Value::Null).unwrap(), "256×513 pixels, max_aspect is 2");
        assert_eq!(Rules::default().reason_against(&[(1, 900)], &Value::Null), None);
    }
}
