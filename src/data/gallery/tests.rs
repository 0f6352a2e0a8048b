//! Clips and views as sets.

use super::*;
use crate::data::shards::ShardWriter;
use crate::data::video::tests::imitation;
use crate::data::{CaptionRule, Members};

fn settings(kind: GalleryKind, images: usize, apart: f64) -> GallerySettings {
    GallerySettings { kind, images, apart, size: 4, rules: Rules::default(), variants: 0, shuffle_window: 0 }
}

/// A folder of `n` grey pictures, of grey 0, 1, 2 …
fn pictures(folder: &Path, n: usize) {
    fs::create_dir_all(folder).unwrap();
    for idx in 0..n {
        RgbImage::from_pixel(6, 5, image::Rgb([idx as u8; 3])).save(folder.join(format!("{idx:03}.png"))).unwrap();
    }
}

fn shown(source: &GallerySource, set_idx: usize, variant: u64) -> Vec<usize> {
    let wanted = Wanted { n_images: 1, variant, is_known: None, masks: false };
    let Dealt::Set(set) = source.deal(set_idx, wanted).unwrap() else { panic!("not dealt") };
    set.images.unwrap().iter().map(|image| image.get_pixel(3, 3).0[0] as usize).collect()
}

fn open(place: &Path, settings: GallerySettings) -> Result<GallerySource> {
    GallerySource::open(place.to_str().unwrap(), settings)
}

#[test]
fn frames_of_a_clip_lie_apart_in_time() {
    let root = tempfile::tempdir().unwrap();
    for (name, n) in [("b/clip", 40), ("a", 5)] {
        pictures(&root.path().join(name), n);
        fs::write(root.path().join(name).with_extension("txt"), format!(" caption of {name}\n")).unwrap();
    }
    let source = open(root.path(), settings(GalleryKind::Clips, 4, 2.0)).unwrap();
    assert_eq!((source.n_sets(), source.variants()), (2, 0));
    // Five frames, two apart: two of them, in the middles of the halves.
    assert_eq!((shown(&source, 0, 0), shown(&source, 1, 0)), (vec![1, 3], vec![5, 15, 25, 35]));
    assert_eq!(source.outline(1).unwrap().unwrap().captions, ["caption of b/clip"; 4]);
    let sets: Vec<Vec<usize>> = (1..50).map(|variant| shown(&source, 1, variant)).collect();
    assert!(sets.iter().all(|set| set.windows(2).all(|pair| pair[1] - pair[0] == 10)));
    assert!((0..10).all(|first| sets.iter().any(|set| set[0] == first)));
    let wanted = Wanted { n_images: 3, variant: 0, is_known: None, masks: false };
    assert!(matches!(source.deal(0, wanted).unwrap(), Dealt::TooSmall(2)));
}

#[test]
fn views_are_any_of_an_object_and_never_the_same_twice() {
    let root = tempfile::tempdir().unwrap();
    pictures(&root.path().join("chair"), 12);
    fs::write(root.path().join("chair/metadata.json"), r#"{"name": "a red chair"}"#).unwrap();
    let rules = Rules { caption: CaptionRule::Template("a render of {name}, {key}".into()), ..Rules::default() };
    let source = open(root.path(), GallerySettings { rules, ..settings(GalleryKind::Views, 4, 1.0) }).unwrap();
    assert_eq!(shown(&source, 0, 0), [0, 3, 6, 9]);
    assert_eq!(source.read(0).unwrap().captions, ["a render of a red chair, chair"; 4]);
    let mut seen = [0; 12];
    for variant in 1..100 {
        let mut set = shown(&source, 0, variant);
        assert_eq!(set, shown(&source, 0, variant));
        set.iter().for_each(|&view| seen[view] += 1);
        set.sort_unstable();
        set.dedup();
        assert_eq!(set.len(), 4);
    }
    assert!(seen.iter().all(|&count| count > 10), "{seen:?}");
}

#[test]
fn videos_in_folders_and_tars_are_clips() {
    let root = tempfile::tempdir().unwrap();
    let ffmpeg = imitation(root.path());
    let (frames, videos) = (root.path().join("frames"), root.path().join("videos"));
    fs::create_dir_all(&frames).unwrap();
    fs::create_dir_all(&videos).unwrap();
    for second in 0..10u8 {
        RgbImage::from_pixel(6, 4, image::Rgb([second; 3])).save(frames.join(format!("{second}.png"))).unwrap();
    }
    let video = format!("00:00:09.00 {}\n", frames.display());
    fs::write(videos.join("a.mp4"), &video).unwrap();
    fs::write(videos.join("a.txt"), "a clip").unwrap();
    let mut writer = ShardWriter::create(&root.path().join("0.tar")).unwrap();
    let members: Members = [("mp4", video.as_str()), ("txt", "a clip")]
        .map(|(suffix, text)| (suffix.to_owned(), text.as_bytes().to_vec()))
        .into();
    writer.push("a", &members).unwrap();
    writer.finish().unwrap();
    let items = |place: &Path| {
        let tars =
            place.is_file().then(|| Dataset::open_files(place.to_str().unwrap(), Layout::Single, is_video).unwrap());
        let mut items = vec![];
        match &tars {
            Some(tars) => items.extend((0..tars.n_samples()).map(Item::InTar)),
            None => collect(place, GalleryKind::Clips, 0, &mut items).unwrap(),
        }
        GallerySource { items, tars, ffmpeg: Some(ffmpeg.clone()), settings: settings(GalleryKind::Clips, 3, 1.0) }
    };
    for place in [videos.clone(), root.path().join("0.tar")] {
        let source = items(&place);
        assert_eq!(shown(&source, 0, 0), [1, 4, 7], "{}", place.display());
        assert_eq!(source.read(0).unwrap().captions, ["a clip"; 3]);
        assert_eq!(source.outline(0).unwrap().unwrap().n_images, 3);
        let content = |variant| {
            let contents = std::cell::RefCell::new(String::new());
            let known = |content: &str| {
                *contents.borrow_mut() = content.to_owned();
                true
            };
            source.deal(0, Wanted { n_images: 1, variant, is_known: Some(&known), masks: false }).unwrap();
            contents.take()
        };
        assert!(content(0) == content(0) && content(0) != content(1) && content(1) != content(2));
    }
    // The rule holds for videos too, once they are dealt.
    let rules = Rules { min_side: 5, ..Rules::default() };
    let settings = GallerySettings { rules, ..settings(GalleryKind::Clips, 3, 1.0) };
    let source = GallerySource { settings, ..items(&videos) };
    let dealt = source.deal(0, Wanted { n_images: 1, variant: 0, is_known: None, masks: false }).unwrap();
    assert!(matches!(dealt, Dealt::PassedOver(reason) if reason == "6×4 pixels, min_side is 5"));
    // Nothing is left of the files that ffmpeg was given.
    let source = items(&root.path().join("0.tar"));
    let Drawn::Frames { video, .. } = source.drawn(0, 0).unwrap() else { panic!("no video") };
    assert!(!video.exists());
}

#[test]
fn what_holds_no_clips_or_has_no_caption_is_told() {
    let root = tempfile::tempdir().unwrap();
    let refusal = |kind| format!("{:#}", open(root.path(), settings(kind, 4, 1.0)).err().unwrap());
    assert!(
        refusal(GalleryKind::Clips).contains("holds no clips") && refusal(GalleryKind::Views).contains("no objects")
    );
    pictures(&root.path().join("a"), 4);
    let source = open(root.path(), settings(GalleryKind::Clips, 4, 1.0)).unwrap();
    let error = format!("{:#}", source.outline(0).unwrap_err());
    assert!(error.contains("/a: the caption is missing; put it beside"), "{error}");
    fs::write(root.path().join("a/002.png"), "no picture").unwrap();
    fs::write(root.path().join("a.txt"), "a caption").unwrap();
    let error = format!("{:#}", source.read(0).unwrap_err());
    assert!(error.contains("/a: 002.png: is not a picture"), "{error}");
}
