//! Many processes under `mpirun`: they train what one trains, and none of them is waited for in vain. Each test prints what it
//! measured; `scripts/check_mpi.sh` runs them. They need Open MPI.
#![cfg(feature = "mpi")]

#[allow(dead_code)] // Of the harness only the command's path.
mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use jedi::model::files::read_safetensors;
use tempfile::TempDir;

/// Largest difference of a weight, as a share of the largest weight of its tensor.
const TOLERANCE: f32 = 1e-5;
const STATE: &str = "checkpoints/latest/state/optimizer.safetensors";

/// One test at a time: the ranks of two would wait for each other's CPUs.
static TURN: Mutex<()> = Mutex::new(());

struct Room {
    folder: TempDir,
    _turn: MutexGuard<'static, ()>,
}

struct Ended {
    code: Option<i32>,
    stderr: String,
}

impl Room {
    fn new() -> Self {
        // A test that failed has said so.
        let turn = TURN.lock().unwrap_or_else(|broken| broken.into_inner());
        let room = Self { folder: tempfile::tempdir().expect("a temporary folder"), _turn: turn };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/toybox");
        let root = root.display();
        let joint = format!(
            "objective = \"joint\"\nseed = 5\n\
             [model]\narchitecture = \"{root}/architecture\"\nvae = \"{root}/model\"\nstart_from = \"{root}/model\"\n\
             [data]\nsource = \"toybox\"\nsets = 40\n\
             [optimizer]\nlr = 1e-4\nwarmup_steps = 5\nema_decay = 0.9\n[joint]\nset_sizes = [2, 3]\n\
             [run]\nsteps = 20\nimages_per_step = 12\nvalidate_every = 0\ncheckpoint_every = 0\npreview_images = 0\n"
        );
        fs::write(room.path("joint.toml"), joint).expect("a file");
        let vae = format!(
            "objective = \"autoencoder\"\n[model]\narchitecture = \"{root}/architecture\"\n\
             [data]\nsource = \"toybox\"\nsets = 40\nimages = 1\nsize = 32\n\
             [run]\nsteps = 100000\nimages_per_step = 8\nvalidate_every = 0\ncheckpoint_every = 2\npreview_images = 0\n"
        );
        fs::write(room.path("vae.toml"), vae).expect("a file");
        room
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `jedi train` in `out` on so many processes (0: without mpirun).
    fn command(&self, ranks: usize, config: &str, out: &str, settings: &[&str]) -> Command {
        let jedi = harness::command([""; 0]);
        let mut command = match ranks {
            0 => jedi,
            ranks => {
                let mut command = mpirun();
                command.args(["-n", &ranks.to_string()]).arg(jedi.get_program());
                command
            }
        };
        command
            .args(["train", "--device", &device(), "--config"])
            .arg(self.path(config))
            .arg("--out")
            .arg(self.path(out));
        command.args(settings.iter().flat_map(|setting| ["--set", setting]));
        command
    }

    fn train(&self, ranks: usize, out: &str, settings: &[&str]) {
        let ended = ended(&mut self.command(ranks, "joint.toml", out, settings));
        assert!(ended.code == Some(0), "{}", ended.stderr);
    }

    /// A run that would go on for long, once it has a checkpoint.
    fn long_run(&self, launcher: &[&str]) -> Child {
        let jedi = self.command(0, "vae.toml", "run", &[]);
        let mut command = mpirun();
        command.args(launcher).arg(jedi.get_program()).args(jedi.get_args());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("mpirun starts");
        let start = Instant::now();
        while !self.path("run").join("checkpoints/latest").exists() {
            assert!(child.try_wait().expect("a child").is_none(), "the run ended: {}", text_of(&mut child));
            assert!(start.elapsed() < Duration::from_secs(120), "no checkpoint after two minutes");
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    }
}

/// Where the runs are: `JEDI_RANKS_DEVICE=cuda` has them on GPUs.
fn device() -> String {
    std::env::var("JEDI_RANKS_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

/// Open MPI, on fewer CPUs than processes, as whoever.
fn mpirun() -> Command {
    let mut command = Command::new("mpirun");
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    command
}

fn ended(command: &mut Command) -> Ended {
    let output = command.output().expect("the command starts");
    Ended { code: output.status.code(), stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
}

fn text_of(child: &mut Child) -> String {
    let mut text = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut text).expect("UTF-8");
    text
}

/// Waits for the end, up to a minute: the seconds that it took, the exit code and what was said.
fn end_of(mut child: Child) -> (f64, Option<i32>, String) {
    let start = Instant::now();
    let code = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status.code();
        }
        if start.elapsed() > Duration::from_secs(60) {
            signal("TERM", child.id());
            panic!("the run goes on after a minute");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    (start.elapsed().as_secs_f64(), code, text_of(&mut child))
}

fn signal(name: &str, process: u32) {
    let sent = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status();
    assert!(sent.expect("kill").success());
}

/// The process of a rank that Open MPI started for `launcher`.
fn process_of(launcher: &Child, rank: usize) -> u32 {
    let own = format!("OMPI_COMM_WORLD_RANK={rank}");
    let is_it = |id: u32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let is_child = status.lines().any(|line| line == format!("PPid:\t{}", launcher.id()));
        let variables = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        is_child && variables.split(|&byte| byte == 0).any(|variable| variable == own.as_bytes())
    };
    let ids = fs::read_dir("/proc").expect("Linux").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.into_iter().find(|&id| is_it(id)).unwrap_or_else(|| panic!("no rank {rank}"))
}

fn figure(what: &str) {
    writeln!(io::stderr(), "figure: {what}").expect("stderr");
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("f32 values")
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(f32::MIN_POSITIVE, |max, value| max.max(value.abs()))
}

fn differences(one: &[f32], other: &[f32]) -> Vec<f32> {
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).collect()
}

/// The largest difference of a weight between two finished runs, as a share of the largest of its tensor, and the tensor.
fn difference(one: &Path, other: &Path, kind: &str) -> (f32, String) {
    let [one, other] = [one, other].map(|run| read_safetensors(&run.join(STATE)).expect("a checkpoint"));
    assert!(one.keys().eq(other.keys()), "other tensors");
    let of = |(name, tensor): (&String, &Tensor)| {
        let (a, b) = (flat(tensor), flat(&other[name]));
        // The softmax does not see a bias of keys: its gradient is rounding alone, which Adam brings to the size of others. It is
        // held to the weights that it is added to.
        let scale = match name.strip_suffix("k_proj.bias") {
            Some(layer) => flat(&one[&format!("{layer}k_proj.weight")]),
            None => a.clone(),
        };
        (largest(&differences(&a, &b)) / largest(&scale), name.clone())
    };
    let all = one.iter().filter(|(name, _)| name.starts_with(kind)).map(of);
    all.max_by(|a, b| a.0.total_cmp(&b.0)).expect("tensors")
}

fn assert_same(what: &str, one: &Path, other: &Path) {
    for kind in ["parameter.", "ema."] {
        let (difference, name) = difference(one, other, kind);
        figure(&format!("{what}: largest relative difference of {kind}* {difference:.1e} ({name})"));
        assert!(difference <= TOLERANCE, "{what}: {name} differs by {difference:e}");
    }
}

#[test]
fn ranks_train_what_one_process_trains_and_go_on_from_each_other() {
    let room = Room::new();
    room.train(0, "alone", &[]);
    let alone = room.path("alone");
    for (ranks, sharded) in [(2, false), (4, false), (4, true)] {
        let (out, sharding) = (format!("{ranks}-{sharded}"), format!("run.shard_optimizer={sharded}"));
        room.train(ranks, &out, &[&sharding]);
        let what = format!("{ranks} processes{}, 20 steps", if sharded { ", sharded" } else { "" });
        assert_same(&what, &alone, &room.path(&out));
    }
    // Six steps on four ranks, six on one, the rest on two with sharded moments.
    room.train(4, "changing", &["run.steps=6"]);
    room.train(0, "changing", &["run.steps=12"]);
    room.train(2, "changing", &["run.shard_optimizer=true"]);
    assert_same("4, then 1, then 2 processes", &alone, &room.path("changing"));
    let losses = |run: &Path| -> Vec<f64> {
        let text = fs::read_to_string(run.join("metrics.jsonl")).expect("a record");
        let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["loss"].as_f64();
        text.lines().map(|line| loss(line).expect("a loss")).collect()
    };
    let (one, other) = (losses(&alone), losses(&room.path("changing")));
    assert_eq!(one.len(), 20);
    for (a, b) in one.iter().zip(&other) {
        assert!((a - b).abs() < 1e-5 * a, "a step saw other pictures: {one:?} {other:?}");
    }
}

/// A fresh network, where the largest weight of a tensor may be small.
#[test]
fn of_a_fresh_network_only_weights_whose_first_gradient_is_rounding_differ_by_more() {
    let room = Room::new();
    let run = |ranks: usize, out: &str, steps: usize| -> BTreeMap<String, Tensor> {
        let steps = format!("run.steps={steps}");
        let ended = ended(&mut room.command(ranks, "vae.toml", out, &[&steps, "run.checkpoint_every=0"]));
        assert!(ended.code == Some(0), "{}", ended.stderr);
        read_safetensors(&room.path(out).join(STATE)).expect("a checkpoint")
    };
    let (start, start_of_four) = (run(0, "start", 1), run(4, "start-of-four", 1));
    let (alone, four) = (run(0, "alone", 20), run(4, "four", 20));
    let [mut of_gradients, mut mean_square, mut furthest] = [0f32; 3];
    let (mut n_beyond, mut n_weights) = (0, 0);
    for name in alone.keys().filter_map(|name| name.strip_prefix("parameter.")) {
        let of = |run: &BTreeMap<String, Tensor>, kind: &str| flat(&run[&format!("{kind}.{name}")]);
        let gradient = of(&start, "first");
        if let Some(layer) = name.strip_suffix("to_k.bias") {
            // The softmax does not see it: its gradient is rounding alone, which Adam brings to the size of others.
            let of_weight = flat(&start[&format!("first.{layer}to_k.weight")]);
            assert!(largest(&gradient) < 1e-5 * largest(&of_weight), "{name}");
            continue;
        }
        // Of the first step: later ones are of weights that Adam has led a little apart.
        let difference = largest(&differences(&gradient, &of(&start_of_four, "first")));
        of_gradients = of_gradients.max(difference / largest(&gradient));
        let weights = of(&alone, "parameter");
        let differences = differences(&weights, &of(&four, "parameter"));
        let square = |values: &[f32]| values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        mean_square = mean_square.max((square(&differences) / square(&weights)).sqrt() as f32);
        furthest = furthest.max(largest(&differences) / largest(&weights));
        n_weights += weights.len();
        // Adam's first step is lr·g / (|g| + 1e-8): where g comes to nearly nothing, it is the step of what is left by rounding.
        let (of_small, bound) = (1e-4 * largest(&gradient), TOLERANCE * largest(&weights));
        for (difference, gradient) in differences.iter().zip(&gradient).filter(|(d, _)| **d > bound) {
            assert!(gradient.abs() < of_small, "{name} differs by {difference:e}");
            n_beyond += 1;
        }
    }
    figure(&format!(
        "4 processes, a fresh network: largest relative difference of the first gradients {of_gradients:.1e}; after 20 steps in the \
         mean square of a tensor's weights {mean_square:.1e}, of a weight {furthest:.1e}, above {TOLERANCE:e} for {n_beyond} \
         of {n_weights} weights"
    ));
    assert!(of_gradients <= TOLERANCE && mean_square <= TOLERANCE, "{of_gradients:e} {mean_square:e}");
    assert!(n_beyond * 10_000 < n_weights && furthest < 1e-3, "{n_beyond} of {n_weights}, {furthest:e}");
}

#[test]
fn ranks_share_the_cpus_of_their_machine_for_decoding_too() {
    let room = Room::new();
    let threads = |ranks: usize, more: &[&str]| {
        let mut command = room.command(ranks, "vae.toml", "tried", &[&["run.micro_batch=1"], more].concat());
        command.env_remove("CANDLE_NUM_THREADS").env_remove("RAYON_NUM_THREADS");
        // No rank is bound: mpirun leaves it to jedi to share out the CPUs.
        command.env("OMPI_MCA_hwloc_base_binding_policy", "none").env("PRTE_MCA_hwloc_default_binding_policy", "none");
        let output = command.arg("--dry-run").output().expect("the command starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().find_map(|line| line.strip_prefix("# threads: ")).expect("a line of threads").to_owned()
    };
    let cpus = std::thread::available_parallelism().expect("a number of CPUs").get();
    let decoding = |ranks: usize| format!("{} decode ahead", (cpus / ranks / 2).max(1));
    assert!(threads(0, &[]).ends_with(&decoding(1)));
    for ranks in [2, 4] {
        let said = threads(ranks, &[]);
        assert!(
            said.ends_with(&format!("{}, in each of {ranks} processes on this machine", decoding(ranks))),
            "{said}"
        );
        assert!(said.split(' ').next().unwrap().parse::<usize>().unwrap() <= (cpus / ranks).max(1), "{said}");
    }
    let said = threads(2, &["data.workers=3"]);
    assert!(said.contains(" 3 decode ahead"), "{said}");
}

#[test]
fn a_killed_rank_is_named_and_ends_the_run_with_its_checkpoint_whole() {
    for (victim, launcher, named) in [
        // The launcher itself ends the others, or leaves that to them: then they must notice.
        (2, &["-n", "3"] as &[&str], "rank 2"),
        (2, &["--enable-recovery", "-n", "3"], "error: rank 2 of 3 ("),
        (0, &["--enable-recovery", "-n", "3"], "error: rank 0 ("),
    ] {
        let room = Room::new();
        let child = room.long_run(launcher);
        signal("KILL", process_of(&child, victim));
        let (secs, code, said) = end_of(child);
        assert!(said.contains(named), "{code:?}: {said}");
        // Under recovery mpirun itself may end with 0, whatever the ranks do.
        assert!(code != Some(0) || launcher.contains(&"--enable-recovery"), "{said}");
        figure(&format!("rank {victim} killed ({}): the run ended after {secs:.1} s", launcher.join(" ")));
        // The checkpoint is whole: a run on another number of processes goes on from it.
        let state = read_safetensors(&room.path("run").join(STATE)).expect("a whole checkpoint");
        assert!(!state.is_empty());
        let target = fs::read_link(room.path("run").join("checkpoints/latest")).expect("a link");
        let step: u64 = target.to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok()).expect("a step");
        let more = format!("run.steps={}", step + 1);
        let again = ended(&mut room.command(2, "vae.toml", "run", &[&more, "run.checkpoint_every=0"]));
        assert!(again.code == Some(0), "{}", again.stderr);
    }
}

#[test]
fn a_polite_signal_to_any_rank_saves_and_ends_all() {
    let room = Room::new();
    let child = room.long_run(&["-n", "3"]);
    signal("TERM", process_of(&child, 1));
    let (secs, _, said) = end_of(child);
    assert!(said.matches("which are saved").count() == 1, "{said}");
    figure(&format!("SIGTERM to rank 1: saved and ended after {secs:.1} s"));
    let steps = fs::read_to_string(room.path("run").join("metrics.jsonl")).expect("a record").lines().count();
    let latest = fs::read_link(room.path("run").join("checkpoints/latest")).expect("a link");
    assert_eq!(latest, Path::new(&format!("step-{steps}")));
}

#[test]
fn what_one_rank_cannot_do_ends_all_with_one_message() {
    let room = Room::new();
    let told_once = |ended: Ended, message: &str| {
        assert!(
            ended.code == Some(2) && ended.stderr.matches("error:").count() == 1,
            "{:?} {}",
            ended.code,
            ended.stderr
        );
        assert!(ended.stderr.contains(message), "{}", ended.stderr);
    };
    let too_many = room.command(3, "vae.toml", "few", &["run.images_per_step=2"]);
    told_once(ended(&mut { too_many }), "leaves 2 sets to a step, too few for 3 processes");
    // Rank 1 alone reads other settings.
    let same = room.command(0, "vae.toml", "other", &["run.steps=1"]);
    let mut command = mpirun();
    command.args(["-n", "1"]).arg(same.get_program()).args(same.get_args());
    command.args([":", "-n", "1"]).arg(same.get_program()).args(same.get_args()).args(["--set", "seed=9"]);
    told_once(ended(&mut command), "rank 1 of 2: --config: not the same as on rank 0");
    assert!(!room.path("few").exists() && !room.path("other").exists(), "nothing is begun");
}
