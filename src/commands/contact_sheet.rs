//! The contact sheet of a data set: one HTML file with everything in it.

use std::fmt::Write as _;
use std::io::Cursor;
use std::path::Path;

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;

use crate::data::survey::{ShownSet, Survey};
use crate::whole_file::write_whole;

const STYLE: &str = "body{font:14px sans-serif;margin:2em;max-width:1200px}pre{background:#f4f4f4;padding:1em;overflow-x:auto}\
                     .set{display:flex;flex-wrap:wrap;gap:8px;margin:0 0 1.5em}.set h3{width:100%;font-size:12px;margin:0;color:#555;\
                     word-break:break-all}figure{margin:0;width:160px}figure img{width:160px;height:160px}figcaption{font-size:12px}\
                     li{word-break:break-word}";

/// Writes the sheet of several sources: what was said of each, its pictures, and all that is broken.
pub fn write(path: &Path, sources: &[(String, Vec<String>, Survey)]) -> Result<()> {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Data sets</title><style>{STYLE}</style></head><body>\n"
    );
    for (name, lines, survey) in sources {
        writeln!(html, "<h1>{}</h1>\n<pre>{}</pre>", escaped(name), escaped(&lines.join("\n")))?;
        for set in &survey.shown {
            push_set(&mut html, set)?;
        }
        for (title, items) in [("Broken", &survey.broken), ("Passed over", &survey.passed_over)] {
            if !items.is_empty() {
                writeln!(html, "<h2>{title}: {}</h2>\n<ul>", items.len())?;
                items.iter().try_for_each(|item| writeln!(html, "<li>{}</li>", escaped(item)))?;
                html += "</ul>\n";
            }
        }
    }
    html += "</body></html>\n";
    write_whole(path, html.as_bytes())
}

fn push_set(html: &mut String, set: &ShownSet) -> Result<()> {
    writeln!(html, "<div class=\"set\"><h3>{}</h3>", escaped(&set.label))?;
    for (image, caption) in set.images.iter().zip(&set.captions) {
        let (source, caption) = (picture(image)?, escaped(caption));
        writeln!(html, "<figure><img src=\"{source}\" alt=\"\"><figcaption>{caption}</figcaption></figure>")?;
    }
    html.push_str("</div>\n");
    Ok(())
}

/// A picture as an address that holds it.
fn picture(image: &RgbImage) -> Result<String> {
    let mut jpeg = Cursor::new(vec![]);
    JpegEncoder::new_with_quality(&mut jpeg, 85).encode_image(image)?;
    Ok(format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg.get_ref())))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_cannot_break_the_page() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sheet.html");
        let shown = ShownSet {
            label: "a/<b>".into(),
            images: vec![RgbImage::new(4, 4)],
            captions: vec!["</figcaption><script>alert(\"x\")</script> & more".into()],
        };
        let survey = Survey { shown: vec![shown], broken: vec!["c: <cut> off".into()], ..Default::default() };
        write(&path, &[("<name>".into(), vec!["  samples 1".into()], survey)]).unwrap();
        let html = std::fs::read_to_string(path).unwrap();
        assert!(
            !html.contains("<script>")
                && html.contains("&lt;script&gt;alert(&quot;x&quot;)")
                && html.contains("&amp; more")
        );
        assert!(
            html.contains("<h2>Broken: 1</h2>") && html.contains("c: &lt;cut&gt; off") && html.contains("&lt;name&gt;")
        );
        assert!(html.contains("src=\"data:image/jpeg;base64,/9j/"));
    }
}
