//! Stable Diffusion in the stages collage, compose and stylise: pictures from text, scenes around things, other styles.

mod collages;
mod scenes;
mod styles;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::stage::Answers;
use crate::diffusion::{Guidance, Sampler};
use crate::interrupt::Interrupt;
use crate::sample::SampleSettings;

pub use collages::{CollageModel, VERSION as COLLAGES_VERSION};
pub use scenes::{PipelinePainter, VERSION as SCENES_VERSION};
pub use styles::{STYLES, StyleModel, VERSION as STYLES_VERSION};

/// How pictures are sampled, as configs call it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // The samplers are documented where they are.
pub enum SamplerName {
    #[default]
    Ddim,
    #[serde(rename = "dpm++")]
    DpmSolver,
    #[serde(rename = "dpm++-karras")]
    DpmSolverKarras,
    Euler,
    EulerKarras,
    #[serde(rename = "euler-a")]
    EulerAncestral,
    #[serde(rename = "unipc")]
    UniPc,
    #[serde(rename = "unipc-karras")]
    UniPcKarras,
}

impl SamplerName {
    /// What it stands for.
    pub fn sampler(self) -> Sampler {
        match self {
            Self::Ddim => Sampler::Ddim,
            Self::DpmSolver => Sampler::DpmSolver { is_karras: false },
            Self::DpmSolverKarras => Sampler::DpmSolver { is_karras: true },
            Self::Euler => Sampler::Euler { is_karras: false },
            Self::EulerKarras => Sampler::Euler { is_karras: true },
            Self::EulerAncestral => Sampler::EulerAncestral,
            Self::UniPc => Sampler::UniPc { is_karras: false },
            Self::UniPcKarras => Sampler::UniPc { is_karras: true },
        }
    }
}

/// How a stage paints; the size is in the pictures or in the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Manner {
    /// How one noise level follows another.
    pub sampler: SamplerName,
    /// Network calls a picture.
    pub steps: usize,
    /// What is pushed towards, and how far.
    pub guidance: Guidance,
}

impl Manner {
    /// Pictures of `size` pixels.
    pub fn at(self, size: usize) -> SampleSettings {
        let sampler = self.sampler.sampler();
        SampleSettings { sampler, ..SampleSettings::new(self.guidance, self.steps, size) }
    }
}

/// Hears of every step done; its error ends the painting.
type OnStep<'a> = &'a mut dyn FnMut() -> Result<()>;

/// Paints a picture an ask.
type Paint<'a, A, T> = &'a mut dyn FnMut(&[A], OnStep) -> Result<Vec<T>>;

/// One picture an ask, all asks at once; if that fails, one by one: a bad ask must not cost the others their pictures. Stops
/// between two steps when `interrupt` is raised.
fn each<A, T>(interrupt: &Interrupt, asks: &[A], paint: Paint<A, T>) -> Answers<T> {
    let mut some = |asks: &[A]| {
        interrupt.check()?;
        paint(asks, &mut || interrupt.check())
    };
    match some(asks) {
        Ok(pictures) => pictures.into_iter().map(Ok).collect(),
        Err(error) if asks.len() <= 1 => vec![Err(error)],
        Err(_) => {
            let mut alone = |ask: &[A]| -> Result<T> {
                let mut pictures = some(ask)?;
                pictures.pop().ok_or_else(|| anyhow::anyhow!("no picture came back"))
            };
            asks.chunks(1).map(&mut alone).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{anyhow, ensure};

    use super::*;
    use crate::interrupt::is_interrupted;

    #[test]
    fn a_bad_ask_costs_the_others_nothing_and_an_interrupt_stops_them_all() {
        let interrupt = Interrupt::default();
        let mut n_calls = 0;
        let mut paint = |asks: &[i32], on_step: OnStep| {
            n_calls += 1;
            on_step()?;
            ensure!(!asks.contains(&2), "no memory");
            Ok(asks.to_vec())
        };
        let answers = each(&interrupt, &[1, 2, 3], &mut paint);
        let found: Vec<Option<i32>> = answers.into_iter().map(Result::ok).collect();
        assert_eq!(found, [Some(1), None, Some(3)]);
        interrupt.request();
        let answers = each(&interrupt, &[1, 3], &mut paint);
        assert!(answers.len() == 2 && answers.iter().all(|answer| answer.as_ref().is_err_and(is_interrupted)));
        assert_eq!(n_calls, 4, "nothing is begun after it");

        // Raised while it paints: heard between two steps.
        let interrupt = Interrupt::default();
        let answers = each(&interrupt, &[1], &mut |_, on_step| {
            interrupt.request();
            on_step()?;
            Err::<Vec<i32>, _>(anyhow!("a step too many"))
        });
        assert!(answers[0].as_ref().is_err_and(is_interrupted));
    }

    #[test]
    fn samplers_are_called_as_the_flags_call_them() {
        let named = |name: &str| serde_json::from_value::<SamplerName>(name.into()).map(SamplerName::sampler);
        assert_eq!(named("ddim").unwrap(), Sampler::Ddim);
        assert_eq!(named("dpm++-karras").unwrap(), Sampler::DpmSolver { is_karras: true });
        assert_eq!(named("euler-karras").unwrap(), Sampler::Euler { is_karras: true });
        assert_eq!(named("euler-a").unwrap(), Sampler::EulerAncestral);
        assert_eq!(named("unipc").unwrap(), Sampler::UniPc { is_karras: false });
        assert!(named("heun").unwrap_err().to_string().contains("`dpm++`"));
    }
}
