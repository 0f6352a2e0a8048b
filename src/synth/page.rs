//! `report.html`: what a dataset yielded, for people. It is put together from the shards' parts, whoever wrote these.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::finish::{REPORT, Sample, ShardReport};
use super::stage::Stage;
use super::yields::{BARS, Means, Yield};
use crate::whole_file::write_whole;

/// Sets, and rejected attempts, shown in all.
const SHOWN: usize = 60;

/// Puts the report of `folder` together; its path, or None where no shard has left its part yet.
pub fn write_page(folder: &Path) -> Result<Option<PathBuf>> {
    let parts = parts_in(folder)?;
    if parts.is_empty() {
        return Ok(None);
    }
    let sum = added(&parts);
    let n_parts = parts.len();
    let (mut accepted, mut rejected): (Vec<Sample>, Vec<Sample>) = (vec![], vec![]);
    for part in parts {
        accepted.extend(part.accepted);
        rejected.extend(part.rejected);
    }
    accepted.truncate(SHOWN);
    rejected.truncate(SHOWN);
    let path = folder.join("report.html");
    write_whole(&path, page(&sum, n_parts, &accepted, &rejected).as_bytes())?;
    Ok(Some(path))
}

/// The counts of all shards that are done in `folder`; None where there is none.
pub fn yields_in(folder: &Path) -> Result<Option<Yield>> {
    let parts = parts_in(folder)?;
    Ok((!parts.is_empty()).then(|| added(&parts)))
}

fn added(parts: &[ShardReport]) -> Yield {
    parts.iter().fold(Yield::default(), |sum, part| sum.plus(&part.yields))
}

/// The shards' parts of the report, in order.
fn parts_in(folder: &Path) -> Result<Vec<ShardReport>> {
    let parts = folder.join(REPORT);
    if !parts.is_dir() {
        return Ok(vec![]);
    }
    let describe = || format!("{}: cannot be read", parts.display());
    let mut files: Vec<PathBuf> = vec![];
    for entry in fs::read_dir(&parts).with_context(describe)? {
        let path = entry.with_context(describe)?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !is_hidden && path.extension().is_some_and(|ending| ending == "json") {
            files.push(path);
        }
    }
    files.sort();
    let read = |file: &PathBuf| {
        let describe = || format!("{}: is no part of a report", file.display());
        serde_json::from_slice(&fs::read(file).with_context(describe)?).with_context(describe)
    };
    files.iter().map(read).collect()
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}\
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.15em .9em .15em 0;text-align:left;vertical-align:top}\
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{margin:0 0 1.2em}figcaption{color:#555;font-size:13px}\
img{max-width:100%;border:1px solid #ddd}h2{margin-top:2em;border-bottom:1px solid #ddd}svg{display:block}";

fn page(sum: &Yield, n_shards: usize, accepted: &[Sample], rejected: &[Sample]) -> String {
    let mut html = String::new();
    let _ = write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Synthetic same-subject sets</title>\
         <style>{STYLE}</style></head><body>\n<h1>Synthetic same-subject sets</h1>\n<p>{n_shards} shards.</p>\n<ul>\n"
    );
    for line in sum.lines() {
        let _ = writeln!(html, "<li>{}</li>", escaped(&line));
    }
    html.push_str("</ul>\n<h2>Seconds by stage</h2>\n");
    let seconds = |stage: &Stage| sum.seconds.get(stage).copied().unwrap_or(0.0);
    table(
        &mut html,
        ["stage", "seconds", "a set"],
        Stage::ALL.iter().map(|stage| {
            let seconds = seconds(stage);
            [stage.name().to_owned(), format!("{seconds:.1}"), format!("{:.3}", seconds / sum.sets.max(1) as f64)]
        }),
    );
    html.push_str("<h2>Instances a collage</h2>\n");
    table(
        &mut html,
        ["instances", "collages", ""],
        sum.instances.iter().map(|(n, count)| [n.to_string(), count.to_string(), String::new()]),
    );
    html.push_str("<h2>What was rejected</h2>\n");
    let reasons = sum.rejected.iter().map(|(reason, count)| (reason, count, "attempts"));
    let dropped = sum.dropped.iter().map(|(reason, count)| (reason, count, "detections"));
    table(
        &mut html,
        ["reason", "how many", "of what"],
        reasons.chain(dropped).map(|(reason, count, of)| [reason.clone(), count.to_string(), of.to_owned()]),
    );
    html.push_str("<h2>Similarity of instances of one collage</h2>\n");
    histogram(&mut html, &sum.identity_bars);
    html.push_str("<h2>Mean similarity within sets (Table 8)</h2>\n");
    let row = |name: &str, means: &Means| {
        let shown =
            |mean: Option<(f64, &str)>| mean.map_or("–".to_owned(), |(mean, by)| format!("{mean:.3} by {by}"));
        let [identity, copy] = means.named().map(shown);
        [name.to_owned(), identity, copy]
    };
    let paper = |name: &str, means: [&str; 2]| [name, means[0], means[1]].map(str::to_owned);
    table(
        &mut html,
        ["", "identity model (paper: CLIP-I)", "copies model (paper: DINO)"],
        [
            row("final, whole pictures", &sum.final_pictures),
            row("instances, cut out", &sum.within_sets),
            paper("the paper's 1.6 M sets", ["0.849", "0.751"]),
            paper("the paper's real pictures", ["0.885", "0.774"]),
        ]
        .into_iter(),
    );
    html.push_str("<p>The paper's columns are CLIP ViT-B/32 and DINO ViT-S/16; other models give other numbers.</p>\n");
    samples(&mut html, "Accepted sets", accepted);
    samples(&mut html, "Rejected attempts", rejected);
    html.push_str(
        "<p>In the collages: green is the set's subject, orange another one, blue a copy left out, red a detection that was \
         not used.</p>\n</body></html>\n",
    );
    html
}

fn table(html: &mut String, head: [&str; 3], rows: impl Iterator<Item = [String; 3]>) {
    html.push_str("<table><tr>");
    for cell in head {
        let _ = write!(html, "<th>{}</th>", escaped(cell));
    }
    html.push_str("</tr>\n");
    for [name, first, second] in rows {
        let (name, first, second) = (escaped(&name), escaped(&first), escaped(&second));
        let _ = writeln!(html, "<tr><td>{name}</td><td class=n>{first}</td><td class=n>{second}</td></tr>");
    }
    html.push_str("</table>\n");
}

/// Bars over [0, 1]; heights by the root, so that a few pairs among thousands can be seen.
fn histogram(html: &mut String, bars: &[usize]) {
    const WIDTH: usize = 12;
    const HEIGHT: f64 = 120.0;
    let most = bars.iter().copied().max().unwrap_or(0).max(1) as f64;
    let _ = write!(html, "<svg width=\"{}\" height=\"150\" role=\"img\">", BARS * WIDTH);
    for (idx, &count) in bars.iter().enumerate() {
        let height = HEIGHT * (count as f64 / most).sqrt();
        let (x, y) = (idx * WIDTH, HEIGHT - height);
        let low = idx as f64 / BARS as f64;
        let _ = write!(
            html,
            "<rect x=\"{x}\" y=\"{y:.1}\" width=\"{}\" height=\"{height:.1}\" fill=\"#47a\"><title>{low:.2} to {:.2}: {count} \
             pairs</title></rect>",
            WIDTH - 1,
            low + 1.0 / BARS as f64
        );
    }
    for tenth in (0..=10).step_by(2) {
        let x = (BARS * WIDTH * tenth / 10).min(BARS * WIDTH - 20);
        let _ = write!(html, "<text x=\"{x}\" y=\"140\" font-size=\"12\">{:.1}</text>", tenth as f64 / 10.0);
    }
    html.push_str("</svg>\n<p>Pairs by the identity model; the heights are roots of the counts.</p>\n");
}

fn samples(html: &mut String, title: &str, samples: &[Sample]) {
    let _ = writeln!(html, "<h2>{title}</h2>");
    if samples.is_empty() {
        html.push_str("<p>None.</p>\n");
    }
    for Sample { picture, lines } in samples {
        let lines: Vec<String> = lines.iter().map(|line| escaped(line)).collect();
        let _ = writeln!(
            html,
            "<figure><img loading=\"lazy\" src=\"{REPORT}/{}\" alt=\"\"><figcaption>{}</figcaption></figure>",
            escaped(picture),
            lines.join("<br>")
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_adds_the_parts_up_and_escapes_what_it_shows() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(write_page(folder.path()).unwrap(), None);
        fs::create_dir(folder.path().join(REPORT)).unwrap();
        for shard in 0..2 {
            let part = ShardReport {
                yields: Yield { numbers: 5, sets: 4, pictures: 12, ..Yield::default() },
                accepted: vec![Sample { picture: "00000/a.png".into(), lines: vec!["a <b> & \"c\"".into()] }],
                rejected: vec![],
            };
            let path = folder.path().join(REPORT).join(format!("{shard:05}.json"));
            fs::write(path, serde_json::to_vec(&part).unwrap()).unwrap();
        }
        let html = fs::read_to_string(write_page(folder.path()).unwrap().unwrap()).unwrap();
        assert!(html.contains("sets: 8 of 10 numbers, 3.0 pictures a set"), "{html}");
        assert!(html.contains("src=\"report/00000/a.png\"") && html.contains("a &lt;b&gt; &amp; &quot;c&quot;"));
        assert!(html.contains("<td>the paper's 1.6 M sets</td><td class=n>0.849</td>"));
    }
}
