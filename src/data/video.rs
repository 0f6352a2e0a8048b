//! Frames of video files, through the program `ffmpeg`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use image::RgbImage;

use super::decode;
use crate::invalid::invalid;

/// Endings of video files.
const VIDEOS: [&str; 6] = ["mp4", "webm", "mkv", "mov", "avi", "m4v"];

/// Whether a file with this ending is a video.
pub fn is_video(suffix: &str) -> bool {
    VIDEOS.contains(&suffix)
}

/// What a video tells of itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VideoFacts {
    /// Seconds.
    pub duration: f64,
    /// Width and height as they are stored; a video on its side has them the other way round.
    pub size: (u32, u32),
}

/// The program.
#[derive(Clone, Debug)]
pub struct Ffmpeg {
    program: PathBuf,
}

impl Ffmpeg {
    /// `ffmpeg` on the PATH; refused where it does not run, for the sake of `place`.
    pub fn find(place: &str) -> Result<Self> {
        Self::at("ffmpeg").map_err(|error| {
            invalid(format!(
                "{place}: holds videos, for which the program ffmpeg must be on the PATH; install it ({error:#})"
            ))
        })
    }

    fn at(program: impl Into<PathBuf>) -> Result<Self> {
        let ffmpeg = Self { program: program.into() };
        let output = ffmpeg.run(&["-version"])?;
        ensure!(output.status.success(), "it fails: {}", last_line(&output));
        Ok(ffmpeg)
    }

    /// What a video tells of itself.
    pub fn look(&self, video: &Path) -> Result<VideoFacts> {
        let video = video.to_string_lossy();
        // It complains that there is nothing to write, behind what it tells of the input.
        let output = self.run(&["-hide_banner", "-i", &video])?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let time = told.lines().find_map(|line| line.trim().strip_prefix("Duration: ")?.split(',').next());
        match (time.and_then(seconds), told.lines().find_map(size)) {
            (Some(duration), Some(size)) => Ok(VideoFacts { duration, size }),
            (None, _) if time.is_some() => {
                bail!("the video does not tell its length; write it again with `ffmpeg -c copy`")
            }
            _ => bail!("ffmpeg cannot read the video: {}", last_line(&output)),
        }
    }

    /// The frame that is shown at `seconds`.
    pub fn frame(&self, video: &Path, seconds: f64) -> Result<RgbImage> {
        let (video, at) = (video.to_string_lossy(), format!("{seconds:.3}"));
        let arguments =
            ["-v", "error", "-ss", &at, "-i", &video, "-frames:v", "1", "-f", "image2pipe", "-c:v", "png", "-"];
        let output = self.run(&arguments)?;
        ensure!(
            output.status.success() && !output.stdout.is_empty(),
            "ffmpeg cannot read the frame at {at} s: {}",
            last_line(&output)
        );
        Ok(decode(&output.stdout)?.image)
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command.arg("-nostdin").args(arguments).stdin(Stdio::null());
        match command.output() {
            Err(error) if error.kind() == ErrorKind::NotFound => bail!("{}: no such program", self.program.display()),
            output => output.with_context(|| format!("{}: cannot be started", self.program.display())),
        }
    }
}

fn last_line(output: &Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr);
    told.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing").trim().to_owned()
}

/// Seconds of `01:02:03.45`.
fn seconds(time: &str) -> Option<f64> {
    let mut parts = time.trim().splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let mut next = || parts.next()?;
    Some(next()? * 3600.0 + next()? * 60.0 + next()?)
}

/// Width and height in a line such as `Stream #0:0: Video: h264 (avc1 / 0x31637661), yuv420p, 640x360 [SAR 1:1], 25 fps`.
fn size(line: &str) -> Option<(u32, u32)> {
    let (_, facts) = line.split_once(" Video: ")?;
    facts.split([' ', ',']).find_map(|word| {
        let (width, height) = word.split_once('x')?;
        // A code in hexadecimal begins with 0x.
        Some((width.parse().ok()?, height.parse().ok()?)).filter(|(width, _)| *width > 0)
    })
}

/// A video's bytes as a file, which ffmpeg can search through, for as long as this lives.
pub struct VideoFile(PathBuf);

impl VideoFile {
    /// Writes the bytes into the folder for temporary files.
    pub fn write(bytes: &[u8], ending: &str) -> Result<Self> {
        static N_WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let number = N_WRITTEN.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("jedi-video-{}-{number}.{ending}", std::process::id()));
        // From here on it is removed, also where only half of it could be written.
        let file = Self(path);
        fs::write(&file.0, bytes).with_context(|| format!("{}: cannot be written", file.0.display()))?;
        Ok(file)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for VideoFile {
    fn drop(&mut self) {
        // What stays behind is in the system's own folder for such things.
        fs::remove_file(&self.0).ok();
    }
}

#[cfg(test)]
pub mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A program that stands in for ffmpeg: a "video" is a text file with its length and its frames' folder; the frame at s
    /// seconds is the picture `<s>.png` there, rounded down.
    pub fn imitation(folder: &Path) -> Ffmpeg {
        let program = folder.join("ffmpeg");
        let script = r#"#!/bin/sh
for last; do :; done
case "$*" in
  *-version*) echo "ffmpeg version 0" ;;
  *-frames:v*)
    while [ "$1" != -ss ]; do shift; done
    read -r length frames < "$4" || exit 1
    cat "$frames/${2%.*}.png" ;;
  *)
    if read -r length frames < "$last"; then
      echo "  Duration: $length, start: 0.0" >&2
      echo "  Stream #0:0: Video: h264 (avc1 / 0x31637661), yuv420p, 6x4 [SAR 1:1], 1 fps" >&2
    else echo "$last: Invalid data found" >&2; fi
    exit 1 ;;
esac
"#;
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        // A file that another thread forked away still open for writing cannot be run yet.
        (0..100)
            .find_map(|_| {
                std::thread::sleep(std::time::Duration::from_millis(5));
                Ffmpeg::at(&program).ok()
            })
            .expect("the script runs")
    }

    #[test]
    fn length_and_frames_are_what_the_program_says() {
        let folder = tempfile::tempdir().unwrap();
        let ffmpeg = imitation(folder.path());
        RgbImage::from_pixel(3, 2, image::Rgb([7; 3])).save(folder.path().join("4.png")).unwrap();
        let video = folder.path().join("a.mp4");
        fs::write(&video, format!("01:00:10.50 {}\n", folder.path().display())).unwrap();
        assert_eq!(ffmpeg.look(&video).unwrap(), VideoFacts { duration: 3610.5, size: (6, 4) });
        assert_eq!(ffmpeg.frame(&video, 4.75).unwrap().get_pixel(2, 1).0, [7; 3]);
        let error = format!("{:#}", ffmpeg.frame(&video, 5.0).unwrap_err());
        assert!(error.contains("cannot read the frame at 5.000 s: ") && error.contains("5.png"), "{error}");
        fs::write(&video, "N/A x\n").unwrap();
        assert!(ffmpeg.look(&video).unwrap_err().to_string().contains("does not tell its length"));
        fs::write(&video, "").unwrap();
        assert!(ffmpeg.look(&video).unwrap_err().to_string().ends_with("a.mp4: Invalid data found"));
    }

    #[test]
    fn a_missing_program_is_told() {
        let error = format!("{:#}", Ffmpeg::at("/no/such/ffmpeg").unwrap_err());
        assert_eq!(error, "/no/such/ffmpeg: no such program");
    }

    #[test]
    fn a_video_file_goes_when_it_is_dropped() {
        let file = VideoFile::write(b"moov", "mp4").unwrap();
        let path = file.path().to_owned();
        assert_eq!(fs::read(&path).unwrap(), b"moov");
        drop(file);
        assert!(!path.exists());
    }
}
