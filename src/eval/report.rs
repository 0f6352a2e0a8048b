//! The numbers that come out of an evaluation: for machines by serde, for people by `Display`.

use std::fmt;

use serde::Serialize;

use super::judge::JudgeSettings;
use super::metrics::Share;
use super::world::World;

/// Everything that was measured, and how good the instrument is.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How the judge was fitted.
    pub judge: JudgeSettings,
    /// The judge on real pictures that it was not fitted to.
    pub oracle: Vec<Row>,
    /// One a condition.
    pub rows: Vec<Row>,
    /// What blind guessing would reach.
    pub chance: Chance,
}

/// How the pictures of one condition were judged.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What the network was shown.
    pub condition: String,
    /// Pictures judged.
    pub n_pictures: usize,
    /// The right one of all toys.
    pub toy: Share,
    /// The right one among the toys of its kind: as the prompt names the kind, this is the measure of identity.
    pub toy_of_kind: Share,
    /// Any toy of the right kind.
    pub kind: Share,
    /// The scene is the prompted one.
    pub scene: Share,
    /// The right one of all toys in the right scene: what a mere copy of the reference never reaches.
    pub toy_and_scene: Share,
    /// The commonest mistakes.
    pub scene_confusions: Vec<NamedConfusion>,
}

/// A scene asked for and the scene seen in its place.
#[derive(Clone, Debug, Serialize)]
pub struct NamedConfusion {
    /// The right name.
    pub asked: String,
    /// The name that was given.
    pub seen: String,
    /// How often.
    pub count: usize,
}

/// Rates of guessing without looking, every toy asked for equally often.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Chance {
    pub toy: f64,
    pub toy_of_kind: f64,
    pub kind: f64,
    pub scene: f64,
    pub toy_and_scene: f64,
}

impl Chance {
    pub fn of(world: &World) -> Self {
        let n_toys = world.n_toys() as f64;
        let kind_sizes = || world.kinds.iter().map(|&kind| world.toys_of_kind(kind).count() as f64);
        let (toy, scene) = (1.0 / n_toys, 1.0 / world.n_scenes() as f64);
        Self {
            toy,
            toy_of_kind: kind_sizes().map(|size| 1.0 / size).sum::<f64>() / n_toys,
            kind: kind_sizes().map(|size| size / n_toys).sum::<f64>() / n_toys,
            scene,
            toy_and_scene: toy * scene,
        }
    }
}

impl Report {
    /// Puts a report together; chance follows from the world.
    pub fn new(world: &World, judge: JudgeSettings, oracle: Vec<Row>, rows: Vec<Row>) -> Self {
        Self { judge, oracle, rows, chance: Chance::of(world) }
    }
}

const HEADS: [&str; 4] = ["toy", "toy of its kind", "scene", "toy and scene"];
/// Width of a column of shares: `100.0 [100.0, 100.0]`.
const SHARE_WIDTH: usize = 20;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let names = self.oracle.iter().chain(&self.rows).map(|row| row.condition.chars().count());
        let width = names.chain(["condition".len()]).max().unwrap_or(0);
        write!(f, "{:width$}  pictures", "condition")?;
        HEADS.iter().try_for_each(|head| write!(f, "  {head:>SHARE_WIDTH$}"))?;
        for row in self.oracle.iter().chain(&self.rows) {
            write!(f, "\n{:width$}  {:>8}", row.condition, row.n_pictures)?;
            for share in [row.toy, row.toy_of_kind, row.scene, row.toy_and_scene] {
                let text = format!("{:.1} [{:.1}, {:.1}]", 100.0 * share.rate, 100.0 * share.low, 100.0 * share.high);
                write!(f, "  {text:>SHARE_WIDTH$}")?;
            }
        }
        let chance = self.chance;
        write!(f, "\n{:width$}  {:>8}", "chance", "")?;
        for rate in [chance.toy, chance.toy_of_kind, chance.scene, chance.toy_and_scene] {
            write!(f, "  {:>SHARE_WIDTH$}", format!("{:.1}", 100.0 * rate))?;
        }
        writeln!(f, "\nper cent, with Wilson 95 % intervals")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let world = World { kinds: vec![0, 0, 0, 1], scenes: vec!["a".into(), "b".into()], n_wordings: 1 };
        let share = Share::new(3, 4);
        let row = Row {
            condition: "one reference".into(),
            n_pictures: 4,
            toy: share,
            toy_of_kind: share,
            kind: share,
            scene: Share::new(0, 4),
            toy_and_scene: share,
            scene_confusions: vec![],
        };
        Report::new(&world, JudgeSettings::default(), vec![], vec![row])
    }

    #[test]
    fn chance_follows_from_the_sizes_of_the_kinds() {
        // Kinds of 3 and 1 toys: (3·1/3 + 1·1)/4 within the kind, (3·3/4 + 1·1/4)/4 for the kind.
        let chance = report().chance;
        assert_eq!((chance.toy, chance.toy_of_kind, chance.kind), (0.25, 0.5, 0.625));
        assert_eq!((chance.scene, chance.toy_and_scene), (0.5, 0.125));
    }

    #[test]
    fn the_table_lines_up() {
        let table = report().to_string();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4, "{table}");
        assert!(lines[1].starts_with("one reference") && lines[1].contains("75.0 [30.1, 95.4]"), "{table}");
        assert!(lines[..3].iter().all(|line| line.len() == lines[0].len()), "{table}");
    }

    #[test]
    fn machines_get_counts_and_bounds() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["rows"][0]["toy"]["hits"], 3);
        assert_eq!(json["rows"][0]["scene"]["low"], 0.0);
        assert_eq!(json["chance"]["scene"], 0.5);
    }
}
