//! Every sampler's whole trajectory on a fixed network output, and its timesteps, against diffusers' schedulers.

use std::collections::BTreeMap;

use jedi::diffusion::schedule::{PredictionType, Spacing};
use jedi::diffusion::{NoiseSchedule, Sampler, ScheduleConfig};

use crate::compare::Comparison;
use crate::golden::Golden;

/// By the names of the script.
pub const SAMPLERS: [(&str, Sampler); 7] = [
    ("dpm++", Sampler::DpmSolver { is_karras: false }),
    ("dpm++ karras", Sampler::DpmSolver { is_karras: true }),
    ("euler", Sampler::Euler { is_karras: false }),
    ("euler karras", Sampler::Euler { is_karras: true }),
    ("euler-a", Sampler::EulerAncestral),
    ("unipc", Sampler::UniPc { is_karras: false }),
    ("unipc karras", Sampler::UniPc { is_karras: true }),
];

const SPACINGS: [(&str, Spacing); 3] =
    [("leading", Spacing::Leading), ("trailing", Spacing::Trailing), ("linspace", Spacing::Linspace)];

#[test]
fn every_step_of_every_sampler_is_diffusers() {
    let case = Golden::open("samplers");
    let mut comparison = Comparison::default();
    for (name, sampler) in SAMPLERS {
        for (spacing, timestep_spacing) in SPACINGS {
            for (prediction, prediction_type) in
                [("epsilon", PredictionType::Epsilon), ("v_prediction", PredictionType::VPrediction)]
            {
                let config = ScheduleConfig { timestep_spacing, prediction_type, ..Default::default() };
                compare_trajectory(&mut comparison, &case, &format!("{name}.{spacing}.{prediction}"), sampler, &config);
            }
        }
    }
    comparison.finish();
}

/// Spacings that begin at the last timestep, which holds nothing of the picture.
#[test]
fn every_step_from_pure_noise_is_diffusers() {
    let case = Golden::open("samplers");
    let mut comparison = Comparison::default();
    for (name, sampler) in SAMPLERS.into_iter().chain([("ddim", Sampler::Ddim)]) {
        for (spacing, timestep_spacing) in SPACINGS {
            if spacing == "leading" || (name == "ddim" && spacing != "trailing") {
                continue;
            }
            let config = ScheduleConfig {
                timestep_spacing,
                prediction_type: PredictionType::VPrediction,
                rescale_betas_zero_snr: true,
                ..Default::default()
            };
            compare_trajectory(&mut comparison, &case, &format!("{name}.{spacing}.zero_snr"), sampler, &config);
        }
    }
    comparison.finish();
}

fn compare_trajectory(
    comparison: &mut Comparison,
    case: &Golden,
    golden: &str,
    sampler: Sampler,
    config: &ScheduleConfig,
) {
    let expected = case.tensor(golden);
    let steps = expected.dim(0).unwrap() - 1;
    let walk = sampler.walk(&NoiseSchedule::new(config).unwrap(), steps).unwrap();
    let mut seen = Vec::new();
    let tolerance = if config.rescale_betas_zero_snr { "tolerance_zero_snr" } else { "tolerance" };
    let result = walk.run(
        case.tensor("noise"),
        &mut |step, _, x| {
            seen.push(x.clone());
            Ok(case.tensor("outputs").get(step)?)
        },
        &mut |step| Ok(case.tensor("ancestral").get(step)?),
    );
    seen.push(result.unwrap());
    assert_eq!(seen.len(), steps + 1, "{golden}");
    for (step, found) in seen.iter().enumerate() {
        comparison.tensor(&format!("{golden} {step}"), found, &expected.get(step).unwrap(), case.fact(tolerance));
    }
}

#[test]
fn timesteps_of_every_sampler_are_diffusers() {
    let expected: BTreeMap<String, BTreeMap<usize, Vec<f64>>> = Golden::open("samplers").fact("timesteps");
    let mut comparison = Comparison::default();
    for (name, sampler) in SAMPLERS {
        for (spacing, timestep_spacing) in SPACINGS {
            let schedule = NoiseSchedule::new(&ScheduleConfig { timestep_spacing, ..Default::default() }).unwrap();
            for (&steps, expected) in &expected[&format!("{name}.{spacing}")] {
                let walk = sampler.walk(&schedule, steps).unwrap();
                let found: Vec<f64> = walk.levels().iter().map(|level| level.timestep).collect();
                // diffusers interpolates Karras's in f32.
                comparison.values(&format!("{name} {spacing} {steps}"), &found, expected, (4e-6, 1000.0));
            }
        }
    }
    comparison.finish();
}
