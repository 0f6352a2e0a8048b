//! The pipeline with stand-ins that take no time: going on, sharing out, memory, failures, other settings.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::rc::Rc;

use anyhow::anyhow;
use image::{Rgb, RgbImage};

use super::embedded::{Filter, Grammar, Layout, Palette, PlainGround, PromptAsCaption, Scenes};
use super::settings::SynthConfig;
use super::stage::{
    Answers, CaptionAsk, Captioner, Collage, CollageAsk, CollagePainter, InpaintAsk, Inpainter, PromptAsk, Prompter,
    Prompts, Stage,
};
use super::tool::{Model, Tool, Tools};
use super::toybox::sheet::ToySheets;
use super::{Done, Job, Part, Watch, synthesise};
use crate::data::{Dataset, Layout as SampleLayout};

/// Paints one colour, and fails where it is told to.
struct Flat {
    fails: fn(u64) -> bool,
}

impl Inpainter for Flat {
    fn size(&self) -> u32 {
        32
    }

    fn inpainted(&mut self, asks: &[InpaintAsk]) -> Answers<RgbImage> {
        let painted = |ask: &InpaintAsk| match (self.fails)(ask.seed) {
            true => Err(anyhow!("no memory")),
            false => Ok(RgbImage::from_pixel(32, 32, Rgb([ask.seed as u8, 90, 200]))),
        };
        asks.iter().map(painted).collect()
    }
}

/// Will not speak of some objects.
struct Prim(Vec<String>);

impl Prompter for Prim {
    fn prompts(&mut self, asks: &[PromptAsk]) -> Answers<Prompts> {
        let answer = |ask: &PromptAsk| match self.0.iter().any(|refused| refused == ask.object) {
            true => Err(anyhow!("refused")),
            false => Grammar { scenes: Scenes::Toybox }.prompts(&[*ask]).remove(0),
        };
        asks.iter().map(answer).collect()
    }
}

/// Counts what is asked of the drawn sheets.
struct Counted(Rc<Cell<usize>>);

impl CollagePainter for Counted {
    fn collages(&mut self, asks: &[CollageAsk]) -> Answers<Collage> {
        self.0.set(self.0.get() + asks.len());
        ToySheets.collages(asks)
    }
}

/// Notes which captions it was asked for, in batches.
struct Noted(Rc<RefCell<Vec<usize>>>);

impl Captioner for Noted {
    fn captions(&mut self, asks: &[CaptionAsk]) -> Answers<String> {
        self.0.borrow_mut().push(asks.len());
        PromptAsCaption.captions(asks)
    }
}

#[derive(Clone, Default)]
struct Counters {
    collages: Rc<Cell<usize>>,
    captions: Rc<RefCell<Vec<usize>>>,
}

fn model(name: &str) -> Model {
    Model { memory_bytes: 3_000_000_000, ..Model::code(name, 1) }
}

fn tools(fails: fn(u64) -> bool, counters: &Counters) -> Tools {
    let (collages, captions) = (counters.collages.clone(), counters.captions.clone());
    Tools {
        prompts: Tool::<dyn Prompter>::new(model("grammar"), || Ok(Box::new(Grammar { scenes: Scenes::Toybox }))),
        collage: Tool::<dyn CollagePainter>::new(model("sheets"), move || Ok(Box::new(Counted(collages.clone())))),
        detect: Tool::new(model("plain"), || Ok(Box::new(PlainGround) as _)),
        segment: Tool::new(model("plain"), || Ok(Box::new(PlainGround) as _)),
        identity: Tool::new(model("palette"), || Ok(Box::new(Palette) as _)),
        copies: Some(Tool::new(model("layout"), || Ok(Box::new(Layout) as _))),
        score_identity: None,
        score_copies: None,
        compose: Tool::<dyn Inpainter>::new(model("flat"), move || Ok(Box::new(Flat { fails }))),
        stylise: Tool::new(model("filter"), || Ok(Box::new(Filter) as _)),
        caption: Tool::<dyn Captioner>::new(model("prompt"), move || Ok(Box::new(Noted(captions.clone())))),
    }
}

fn job(root: &tempfile::TempDir, name: &str) -> Job {
    let mut config = SynthConfig::default();
    config.prompts.objects = "toybox".into();
    config.affinity.threshold = 0.96;
    config.sets.sets_per_shard = 5;
    config.sets.batch = 2;
    config.sets.min_images = 4;
    config.sets.masks = true;
    Job {
        config,
        sets: 12,
        folder: root.path().join(name),
        work: None,
        part: Part::ALL,
        limit: None,
        until: Stage::Score,
        keep_rejected: false,
    }
}

/// Runs until it was asked `until_asked` times whether to stop.
fn run_some(job: &Job, tools: &mut Tools, until_asked: usize) -> Done {
    let asked = Cell::new(0);
    let interrupted = || asked.replace(asked.get() + 1) >= until_asked;
    synthesise(job, tools, &mut Watch { progress: &mut |_| (), interrupted: &interrupted }).unwrap()
}

fn run(job: &Job) -> Done {
    run_some(job, &mut tools(|_| false, &Counters::default()), usize::MAX)
}

/// The files of a folder and their bytes, without the report's, which tells seconds, and the parts' locks.
fn files(job: &Job) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&job.folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path.extension().is_none_or(|suffix| suffix != "lock") {
            files.insert(path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap());
        }
    }
    files
}

#[test]
fn a_run_stopped_after_every_step_makes_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let straight = job(&root, "straight");
    let done = run(&straight);
    assert_eq!((done.written, done.missing, done.yields.sets), (3, 0, 12), "{:?}", done.yields);
    let expected = files(&straight);
    assert_eq!(
        expected.keys().map(String::as_str).collect::<Vec<_>>(),
        ["00000.tar", "00001.tar", "00002.tar", "dataset.json"]
    );
    assert!(!straight.folder.join(".work").exists());

    let broken = job(&root, "broken");
    let mut n_runs = 0;
    loop {
        // Each run does three stages of a batch.
        let done = run_some(&broken, &mut tools(|_| false, &Counters::default()), 3);
        n_runs += 1;
        // A kill in the middle of writing.
        if broken.folder.join(".work/00001").is_dir() {
            fs::write(broken.folder.join(".work/00001/.b0000.r0.caption.tar.7.tmp"), "half").unwrap();
        }
        if done.missing == 0 {
            break;
        }
        assert!(n_runs < 100);
        fs::write(broken.folder.join(".00002.tar.7.tmp"), "half").unwrap();
    }
    assert!(n_runs > 15, "{n_runs}");
    assert!(files(&broken) == expected);
    assert_eq!(run(&broken), Done { kept: 3, ..Done::default() });
}

#[test]
fn what_is_written_reads_as_training_data_and_tells_how_it_was_made() {
    let root = tempfile::tempdir().unwrap();
    let job = job(&root, "data");
    run(&job);
    let dataset = Dataset::open(job.folder.to_str().unwrap(), SampleLayout::Sets).unwrap();
    assert_eq!(dataset.n_samples(), 12);
    let set = dataset.read(7).unwrap();
    assert_eq!((set.key.as_str(), set.images.len(), set.masks.len()), ("00000007", 4, 4));
    let json = &set.metadata;
    assert_eq!((json["source"].as_str(), json["number"].as_u64()), (Some("synth"), Some(7)));
    assert_eq!(json["pictures"][2]["caption"], set.captions[2]);
    assert!(set.captions[2].contains(json["object"].as_str().unwrap()));
    assert_eq!(json["instance_scores"].as_array().unwrap().len(), 6);
    assert_eq!(json["picture_scores"].as_array().unwrap().len(), 6);
    assert_eq!(json["stages"]["affinity"]["models"][0]["name"], "palette");
    // The mask is white where the box is, and nowhere else.
    let area = &json["pictures"][0]["box"];
    let (left, width) = (area["left"].as_u64().unwrap() as u32, area["width"].as_u64().unwrap() as u32);
    let columns: Vec<u32> =
        set.masks[0].enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] > 127).map(|(x, ..)| x).collect();
    assert!(columns.iter().all(|x| (left..left + width).contains(x)) && columns.len() > 40);
}

#[test]
fn memory_changes_the_order_of_work_alone() {
    let root = tempfile::tempdir().unwrap();
    let together = job(&root, "together");
    let mut alone = job(&root, "alone");
    alone.config.sets.memory_gb = 0.0;
    let mut some = job(&root, "some");
    some.config.sets.memory_gb = 9.0;
    let n_groups = |job: &Job| job.groups(&tools(|_| false, &Counters::default())).len();
    assert_eq!((n_groups(&together), n_groups(&alone), n_groups(&some)), (2, 8, 4));
    for runs in [&together, &alone, &some] {
        run(runs);
    }
    assert!(files(&together) == files(&alone) && files(&together) == files(&some));
}

#[test]
fn parts_make_up_the_whole() {
    let root = tempfile::tempdir().unwrap();
    let whole = job(&root, "whole");
    run(&whole);
    for index in [1, 2, 0] {
        let part = Job { part: Part::new(index, 3).unwrap(), ..job(&root, "parts") };
        assert_eq!(run(&part).written, 1);
    }
    assert!(files(&whole) == files(&job(&root, "parts")));
}

#[test]
fn a_model_that_fails_now_and_then_costs_attempts_and_they_are_told() {
    let root = tempfile::tempdir().unwrap();
    let mut job = job(&root, "data");
    job.keep_rejected = true;
    job.config.sets.attempts = 4;
    // One picture of eight; of four pictures a set half the attempts fail.
    let done = run_some(&job, &mut tools(|seed| seed % 8 == 0, &Counters::default()), usize::MAX);
    let sum = &done.yields;
    let n_failed = sum.rejected["compose: the model failed"];
    assert!(n_failed > 2 && sum.sets > 8, "{sum:?}");
    assert_eq!((sum.sets + sum.skipped, sum.numbers), (12, 12));
    assert_eq!(sum.collages, sum.sets + sum.rejected.values().sum::<usize>());
    let rejected = Dataset::open(job.folder.join("rejected").to_str().unwrap(), SampleLayout::Single).unwrap();
    assert_eq!(rejected.n_samples(), sum.rejected.values().sum::<usize>());
    assert_eq!(rejected.read(0).unwrap().metadata["rejection"]["detail"], "no memory");

    // A model that never succeeds ends the run, and what was done stays.
    let mut broken = tools(|_| true, &Counters::default());
    let dead = Job { folder: root.path().join("dead"), ..job };
    let error =
        synthesise(&dead, &mut broken, &mut Watch { progress: &mut |_| (), interrupted: &|| false }).unwrap_err();
    let message = format!("{error:#}");
    assert!(message.contains("stage compose") && message.contains("flat: failed 8 times of 8: no memory"), "{message}");
    assert!(dead.folder.join(".work/00000/b0000.r0.affinity.tar").exists());
}

#[test]
fn objects_that_are_refused_for_good_are_skipped_and_counted() {
    let root = tempfile::tempdir().unwrap();
    let mut job = job(&root, "data");
    (job.config.sets.sets_per_shard, job.config.sets.batch) = (12, 12);
    let refused: Vec<String> = job.config.objects().unwrap()[..4].to_vec();
    let mut tools = tools(|_| false, &Counters::default());
    tools.prompts = Tool::<dyn Prompter>::new(model("prim"), move || Ok(Box::new(Prim(refused.clone()))));
    let sum = run_some(&job, &mut tools, usize::MAX).yields;
    assert_eq!((sum.numbers, sum.sets, sum.skipped), (12, 8, 4), "{sum:?}");
    assert_eq!(sum.rejected["prompts: the model failed"], 3 * 4, "three attempts each");
}

#[test]
fn a_full_disk_stops_the_run_and_the_next_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let counters = Counters::default();
    let job = job(&root, "data");
    let mut full = tools(|_| false, &counters);
    full.caption =
        Tool::<dyn Captioner>::new(model("prompt"), || Err(std::io::Error::from(ErrorKind::StorageFull).into()));
    let mut watch = Watch { progress: &mut |_| (), interrupted: &|| false };
    let message = format!("{:#}", synthesise(&job, &mut full, &mut watch).unwrap_err());
    assert!(message.starts_with("the disk is full; nothing is lost: make room"), "{message}");
    let n_painted = counters.collages.get();
    assert_eq!(run_some(&job, &mut tools(|_| false, &counters), usize::MAX).written, 3);
    assert!(n_painted > 0);
    assert_eq!(counters.collages.get(), 12, "what was painted before is used");
}

#[test]
fn a_changed_setting_starts_at_its_stage() {
    let root = tempfile::tempdir().unwrap();
    let counters = Counters::default();
    let mut job = job(&root, "data");
    job.config.sets.attempts = 1;
    job.until = Stage::Affinity;
    job.limit = Some(5);
    job.config.affinity.threshold = 0.999_999;
    let mut tools = tools(|_| false, &counters);
    let done = run_some(&job, &mut tools, usize::MAX);
    assert_eq!((done.yields.numbers, done.yields.sets), (5, 0));
    assert_eq!((done.written, done.missing, counters.collages.get()), (0, 3, 5));
    assert!(job.folder.join(".work/report/00000.json").exists() && !job.folder.join("dataset.json").exists());

    job.config.affinity.threshold = 0.96;
    let done = run_some(&job, &mut tools, usize::MAX);
    assert_eq!((done.yields.sets, counters.collages.get()), (5, 5), "the collages of before are used");
    assert!(counters.captions.borrow().is_empty());

    job.until = Stage::Score;
    job.limit = None;
    assert_eq!(run_some(&job, &mut tools, usize::MAX).written, 3);
    assert_eq!(counters.collages.get(), 12);
    assert_eq!(*counters.captions.borrow(), [8, 8, 4, 8, 8, 4, 8], "batches of two sets");
    assert!(!job.folder.join(".work").exists());
    job.config.affinity.threshold = 0.97;
    let refusal =
        synthesise(&job, &mut tools, &mut Watch { progress: &mut |_| (), interrupted: &|| false }).unwrap_err();
    assert!(refusal.to_string().contains("affinity.threshold is 0.96"), "{refusal}");
}

#[test]
fn work_kept_elsewhere_serves_another_folder() {
    let root = tempfile::tempdir().unwrap();
    let counters = Counters::default();
    let work = Some(root.path().join("work"));
    let first = Job { work: work.clone(), ..job(&root, "first") };
    run_some(&first, &mut tools(|_| false, &counters), usize::MAX);
    let mut second = Job { work, ..job(&root, "second") };
    second.config.stylise.probability = 0.0;
    let done = run_some(&second, &mut tools(|_| false, &counters), usize::MAX);
    assert_eq!((done.yields.sets, done.yields.styled), (12, 0));
    assert_eq!(counters.collages.get(), 12, "drawn once");
}
