//! The files of one set, and what they say: strip or loose pictures, captions, masks, metadata. Knows nothing of where
//! the files lie; folders and tars share it.

use std::collections::BTreeMap;
use std::io::Cursor;

use anyhow::{Context, Result, bail, ensure};
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage, imageops};

use super::captions::CaptionRule;
use super::cut::{Region, part};
use super::{ImageSet, decode, middle_square};

/// Name behind the sample's key (`png`, `txt`, `0.mask.png`) → bytes.
pub type Members = BTreeMap<String, Vec<u8>>;

/// Stands between the captions of a set.
pub const CAPTION_SEPARATOR: &str = "<|split|>";

/// Endings of pictures.
const PICTURES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// What a sample's one picture file means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Square pictures one under the other, or loose numbered files: sets.
    #[default]
    Sets,
    /// One picture of any shape with one caption (img2dataset): sets of 1, cropped to the middle square.
    Single,
}

/// The part of a file name before its first dot, and the rest. None where there is no dot, or nothing before it.
pub fn split_name(name: &str) -> Option<(&str, &str)> {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + name[base..].find('.')?;
    (dot > base).then(|| (&name[..dot], &name[dot + 1..]))
}

/// Whether a member holds a picture of the set (a mask does not).
pub fn is_picture(suffix: &str) -> bool {
    picture_number(suffix).is_some() || PICTURES.contains(&suffix)
}

/// 2 for `2.jpg`.
fn picture_number(suffix: &str) -> Option<usize> {
    let (number, ending) = suffix.split_once('.')?;
    PICTURES.contains(&ending).then(|| number.parse().ok())?
}

/// The set that a sample's files make up. Errors name the file by its ending; the caller puts the sample in front.
pub fn set_from_members(key: &str, members: &Members, layout: Layout, rule: &CaptionRule) -> Result<ImageSet> {
    let suffixes: Vec<&str> = members.keys().map(String::as_str).collect();
    let mut images = vec![];
    for (picture, regions) in pictures(members, layout)? {
        images.extend(regions.into_iter().map(|region| part(&picture, region.middle_square())));
    }
    let bytes = |suffix: &str| members.get(suffix).map(Vec::as_slice);
    let metadata = metadata(bytes("json"))?;
    let from_file = || caption_texts(bytes("txt"), images.len(), layout);
    let captions = rule.captions(key, &metadata, images.len(), from_file)?;
    check_mask_names(&suffixes, images.len())?;
    let masks = masks(members, &images)?;
    Ok(ImageSet { key: key.to_owned(), images, captions, masks, metadata })
}

/// A sample's picture files, decoded, and where in each the pictures of the set lie, in order.
pub fn pictures(members: &Members, layout: Layout) -> Result<Vec<(RgbImage, Vec<Region>)>> {
    let suffixes: Vec<&str> = members.keys().map(String::as_str).collect();
    let loose = if layout == Layout::Sets { loose_pictures(&suffixes)? } else { vec![] };
    if !loose.is_empty() || layout == Layout::Single {
        let files = if loose.is_empty() { vec![one_picture(&suffixes)?] } else { loose };
        let whole = |suffix: &str| {
            let picture = picture(members, suffix)?;
            let region = Region::all(&picture);
            Ok((picture, vec![region]))
        };
        return files.into_iter().map(whole).collect();
    }
    let suffix = one_picture(&suffixes)?;
    let strip = picture(members, suffix)?;
    let (side, height) = strip.dimensions();
    let n_images = strip_length(side, height).with_context(|| format!(".{suffix}"))?;
    let square = |idx| Region { x: 0, y: idx * side, width: side, height: side };
    Ok(vec![(strip, (0..n_images).map(square).collect())])
}

/// The endings of a set's loose pictures in order; empty for a strip.
pub fn loose_pictures<'a>(suffixes: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut loose: Vec<(usize, &str)> =
        suffixes.iter().filter_map(|&suffix| Some((picture_number(suffix)?, suffix))).collect();
    loose.sort_unstable();
    for (expected, (number, _)) in loose.iter().enumerate() {
        ensure!(*number == expected, ".{expected}.*: picture {expected} is missing or there twice; number them from 0");
    }
    Ok(loose.into_iter().map(|(_, suffix)| suffix).collect())
}

/// The ending of a sample's only picture.
pub fn one_picture<'a>(suffixes: &[&'a str]) -> Result<&'a str> {
    let mut found = PICTURES.iter().filter_map(|picture| suffixes.iter().find(|suffix| *suffix == picture));
    match (found.next(), found.next()) {
        (Some(suffix), None) => Ok(suffix),
        (Some(first), Some(second)) => bail!(".{first} and .{second} are both there; keep one"),
        (None, _) => bail!("no picture (.png, .jpg, .webp)"),
    }
}

fn picture(members: &Members, suffix: &str) -> Result<RgbImage> {
    // What was changed on the way (alpha, depth) is of no use to anyone in a data set of thousands.
    Ok(decode(&members[suffix]).with_context(|| format!(".{suffix}"))?.image)
}

/// n, the pictures of a strip of this width and height.
pub fn strip_length(side: u32, height: u32) -> Result<u32> {
    ensure!(
        height.is_multiple_of(side),
        "a strip {side} wide and {height} high is not made of squares one under the other; for single pictures of any \
         shape choose the layout single"
    );
    Ok(height / side)
}

/// The captions in the bytes of a sample's text file.
pub fn caption_texts(txt: Option<&[u8]>, n_images: usize, layout: Layout) -> Result<Vec<String>> {
    let bytes = txt.context(".txt: the captions are missing; it may be an empty file for one picture")?;
    let text = std::str::from_utf8(bytes).context(".txt: is not UTF-8")?;
    if layout == Layout::Single {
        return Ok(vec![text.trim().to_owned()]);
    }
    let captions: Vec<String> = text.split(CAPTION_SEPARATOR).map(|caption| caption.trim().to_owned()).collect();
    let n_captions = captions.len();
    ensure!(
        n_captions == n_images,
        ".txt: {n_captions} captions for {n_images} pictures; there must be one a picture, joined by {CAPTION_SEPARATOR}"
    );
    Ok(captions)
}

/// What else is known, from the bytes of a sample's JSON file.
pub fn metadata(json: Option<&[u8]>) -> Result<serde_json::Value> {
    json.map_or(Ok(serde_json::Value::Null), |bytes| serde_json::from_slice(bytes).context(".json: is not JSON"))
}

fn mask_name(idx: usize) -> String {
    format!("{idx}.mask.png")
}

/// Masks must be there for all pictures or none.
pub fn check_mask_names(suffixes: &[&str], n_images: usize) -> Result<()> {
    let has = |idx: usize| suffixes.contains(&mask_name(idx).as_str());
    let missing = (0..n_images).find(|&idx| !has(idx)).filter(|_| (0..n_images).any(has));
    match missing {
        None => Ok(()),
        Some(idx) => bail!(".{}: is missing; there must be masks for all pictures or none", mask_name(idx)),
    }
}

/// The mask of picture `idx`, as large as it is stored; None: there is none.
pub fn mask(members: &Members, idx: usize) -> Result<Option<GrayImage>> {
    let name = mask_name(idx);
    let Some(bytes) = members.get(&name) else { return Ok(None) };
    let decoded = decode(bytes).with_context(|| format!(".{name}"))?.image;
    Ok(Some(DynamicImage::ImageRgb8(decoded).into_luma8()))
}

fn masks(members: &Members, images: &[RgbImage]) -> Result<Vec<GrayImage>> {
    if !members.contains_key(&mask_name(0)) {
        return Ok(vec![]);
    }
    let mask = |(idx, image): (usize, &RgbImage)| {
        let mask = decode(&members[&mask_name(idx)])?.image;
        // Loose pictures lose their margins; the mask is of the whole picture and loses the same.
        let mask = DynamicImage::ImageRgb8(middle_square(&mask)).into_luma8();
        let (side, other) = (image.width(), mask.width());
        ensure!(side == other, "{other} pixels a side for a picture of {side}; make them equal");
        Ok(mask)
    };
    images.iter().enumerate().map(|each| mask(each).with_context(|| format!(".{}", mask_name(each.0)))).collect()
}

/// The files of a set as a PNG strip: the picture, `txt`, `json` where there is metadata, masks where there are any.
pub fn members_from_set(set: &ImageSet) -> Result<Members> {
    let side = set.images.first().context("a set without pictures cannot be written")?.width();
    let n_images = set.images.len();
    ensure!(
        set.images.iter().all(|image| image.dimensions() == (side, side)),
        "pictures of a strip must be equal squares"
    );
    ensure!(set.captions.len() == n_images, "{} captions for {n_images} pictures", set.captions.len());
    ensure!([0, n_images].contains(&set.masks.len()), "{} masks for {n_images} pictures", set.masks.len());
    if let Some(caption) = set.captions.iter().find(|caption| caption.contains(CAPTION_SEPARATOR)) {
        bail!("the caption {caption:?} contains {CAPTION_SEPARATOR}, which separates captions");
    }
    let mut strip = RgbImage::new(side, side * n_images as u32);
    for (idx, image) in set.images.iter().enumerate() {
        imageops::replace(&mut strip, image, 0, i64::from(side) * idx as i64);
    }
    let mut members = Members::new();
    members.insert("png".to_owned(), png(strip.into())?);
    members.insert("txt".to_owned(), set.captions.join(CAPTION_SEPARATOR).into_bytes());
    if !set.metadata.is_null() {
        members.insert("json".to_owned(), serde_json::to_vec_pretty(&set.metadata)?);
    }
    for (idx, mask) in set.masks.iter().enumerate() {
        members.insert(format!("{idx}.mask.png"), png(mask.clone().into())?);
    }
    Ok(members)
}

fn png(image: DynamicImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(vec![]);
    image.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 11) as u8, (y * 3) as u8, (x + y) as u8]))
    }

    fn set(n: usize) -> ImageSet {
        ImageSet {
            key: "a".to_owned(),
            images: (0..n)
                .map(|idx| imageops::crop_imm(&picture(20, 90), 0, idx as u32 * 9, 20, 20).to_image())
                .collect(),
            captions: (0..n).map(|idx| format!("caption {idx}")).collect(),
            masks: vec![],
            metadata: serde_json::Value::Null,
        }
    }

    fn members(files: &[(&str, Vec<u8>)]) -> Members {
        files.iter().map(|(suffix, bytes)| (suffix.to_string(), bytes.clone())).collect()
    }

    fn read(members: &Members, layout: Layout) -> Result<ImageSet> {
        set_from_members("a", members, layout, &CaptionRule::File)
    }

    fn refusal(files: &[(&str, Vec<u8>)]) -> String {
        format!("{:#}", read(&members(files), Layout::Sets).unwrap_err())
    }

    fn assert_same(a: &ImageSet, b: &ImageSet) {
        assert_eq!(
            (&a.key, &a.images, &a.captions, &a.masks, &a.metadata),
            (&b.key, &b.images, &b.captions, &b.masks, &b.metadata)
        );
    }

    #[test]
    fn a_strip_comes_back_as_it_was_written() {
        for n in 1..4 {
            let mut set = set(n);
            assert_same(&read(&members_from_set(&set).unwrap(), Layout::Sets).unwrap(), &set);
            set.masks = (0..n)
                .map(|idx| GrayImage::from_fn(20, 20, |x, y| image::Luma([(x * y) as u8 / 2 + idx as u8])))
                .collect();
            set.metadata = serde_json::json!({"subject": {"seed": u64::MAX}});
            assert_same(&read(&members_from_set(&set).unwrap(), Layout::Sets).unwrap(), &set);
        }
    }

    #[test]
    fn loose_pictures_are_cropped_and_ordered_by_number() {
        let mut files: Vec<(String, Vec<u8>)> = (0..11)
            .map(|idx| {
                (
                    format!("{idx}.png"),
                    png(RgbImage::from_pixel(20 + idx, 24, image::Rgb([idx as u8; 3])).into()).unwrap(),
                )
            })
            .collect();
        files.push(("txt".to_owned(), [""; 11].join(CAPTION_SEPARATOR).into_bytes()));
        let set = read(&files.into_iter().collect(), Layout::Sets).unwrap();
        for (idx, image) in set.images.iter().enumerate() {
            assert_eq!(image.dimensions(), ((20 + idx as u32).min(24), (20 + idx as u32).min(24)));
            assert_eq!(image.get_pixel(0, 0).0, [idx as u8; 3]);
        }
        assert_eq!(set.captions, [""; 11]);
    }

    #[test]
    fn single_pictures_may_have_any_shape() {
        let files =
            members(&[("jpg", png(picture(30, 20).into()).unwrap()), ("txt", b" one <|split|> two\n".to_vec())]);
        let set = read(&files, Layout::Single).unwrap();
        assert_eq!((set.images.len(), set.images[0].dimensions()), (1, (20, 20)));
        assert_eq!(set.captions, ["one <|split|> two"]);
    }

    #[test]
    fn broken_samples_are_refused_with_their_file() {
        let strip = |width, height| png(picture(width, height).into()).unwrap();
        let txt = |text: &str| ("txt", text.as_bytes().to_vec());
        assert!(refusal(&[("png", strip(20, 50)), txt("a")]).starts_with(".png: a strip 20 wide and 50 high"));
        assert!(refusal(&[("png", strip(20, 60)), txt("a<|split|>b")]).starts_with(".txt: 2 captions for 3 pictures"));
        assert!(refusal(&[("png", strip(20, 60))]).starts_with(".txt: the captions are missing"));
        assert!(
            refusal(&[("png", strip(20, 40)[..90].to_vec()), txt("a<|split|>b")])
                .starts_with(".png: is broken or cut off")
        );
        assert!(refusal(&[("png", strip(20, 20)), ("webp", strip(20, 20)), txt("a")]).contains("both"));
        assert!(refusal(&[("png", strip(20, 20)), ("txt", vec![0xff])]).contains("UTF-8"));
        assert!(
            refusal(&[("png", strip(20, 20)), txt("a"), ("json", b"{".to_vec())]).starts_with(".json: is not JSON")
        );
        assert!(refusal(&[txt("a")]).contains("no picture"));
        assert!(
            refusal(&[("0.png", strip(20, 20)), ("2.png", strip(20, 20)), txt("a")]).starts_with(".1.*: picture 1")
        );
    }

    #[test]
    fn masks_are_for_all_pictures_and_of_their_size() {
        let mut set = set(2);
        set.masks = vec![GrayImage::new(20, 20); 2];
        let whole = members_from_set(&set).unwrap();
        let refusal = |members: &Members| format!("{:#}", read(members, Layout::Sets).unwrap_err());
        let mut without = whole.clone();
        without.remove("1.mask.png");
        assert!(refusal(&without).starts_with(".1.mask.png: is missing"));
        let mut other = whole;
        other.insert("0.mask.png".to_owned(), png(GrayImage::new(10, 10).into()).unwrap());
        assert!(refusal(&other).starts_with(".0.mask.png: 10 pixels a side for a picture of 20"));
    }

    #[test]
    fn what_could_not_be_read_back_is_not_written() {
        let mut wrong = set(2);
        wrong.captions[1] = "a<|split|>b".to_owned();
        assert!(members_from_set(&wrong).is_err());
        wrong = set(2);
        wrong.captions.pop();
        assert!(members_from_set(&wrong).is_err());
        assert!(members_from_set(&ImageSet::default()).is_err());
    }

    #[test]
    fn names_split_at_the_first_dot_behind_the_folder() {
        assert_eq!(split_name("a.b/00001.0.mask.png"), Some(("a.b/00001", "0.mask.png")));
        assert_eq!(split_name("00001.txt"), Some(("00001", "txt")));
        assert_eq!(split_name(".hidden.png"), None);
        assert_eq!(split_name("a/README"), None);
        assert!(is_picture("png") && is_picture("3.jpg") && !is_picture("0.mask.png") && !is_picture("txt"));
    }
}
