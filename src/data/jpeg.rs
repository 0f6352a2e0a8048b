//! What the markers of a JPEG say before anyone decodes it. The decoder fills the missing part of a cut-off file with
//! grey without a word, and takes all four-ink files for Adobe's; both are told here. A hole in the middle of a file whose
//! end is there goes unseen. Read `decode` next.

/// Facts of the first picture in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    /// 1 grey, 3 colour, 4 inks; 0 where no frame header was found.
    pub components: u8,
    /// Adobe's marker is there: inks are stored inverted.
    pub adobe: bool,
    /// The end marker was reached.
    pub complete: bool,
}

/// Walks the markers (ITU T.81, annex B) up to the first picture's end.
pub fn outline(bytes: &[u8]) -> Outline {
    let mut found = Outline::default();
    let mut at = 2;
    while let Some(start) = next_marker(bytes, at) {
        let marker = bytes[start];
        let body = start + 3;
        if marker == 0xd9 {
            found.complete = true;
            break;
        }
        let Some(&[high, low]) = bytes.get(start + 1..body) else { break };
        let payload = bytes.get(body..).unwrap_or_default();
        match marker {
            // Frame headers: precision, height, width, then the number of components.
            0xc0..=0xcf if ![0xc4, 0xc8, 0xcc].contains(&marker) => {
                found.components = payload.get(5).copied().unwrap_or_default();
            }
            0xee => found.adobe |= payload.starts_with(b"Adobe"),
            _ => {}
        }
        at = start + 1 + usize::from(u16::from_be_bytes([high, low]));
    }
    found
}

/// Where the next marker's code is; passes over entropy-coded data, where 0xff is followed by 0 or a restart marker.
fn next_marker(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xff)? + 1;
        match *bytes.get(at)? {
            0x00 | 0x01 | 0xd0..=0xd8 => at += 1,
            0xff => {}
            _ => return Some(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CMYK: &[u8] = include_bytes!("../../tests/fixtures/cmyk.jpg");

    #[test]
    fn tells_inks_and_adobe() {
        assert_eq!(outline(CMYK), Outline { components: 4, adobe: true, complete: true });
    }

    #[test]
    fn every_cut_off_file_is_incomplete() {
        for length in 2..CMYK.len() {
            assert!(!outline(&CMYK[..length]).complete, "{length} of {} bytes", CMYK.len());
        }
    }

    #[test]
    fn takes_anything_for_input() {
        assert_eq!(outline(&[]), Outline::default());
        assert_eq!(outline(&[0xff; 9]), Outline::default());
        assert_eq!(outline(&[0xff, 0xd8, 0xff, 0xc0, 0, 0]), Outline::default());
    }
}
