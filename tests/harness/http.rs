//! Requests as the servers on the loopback read them.

use std::io::{BufRead, Result};

/// The head of a request.
pub struct Head {
    /// Such as `GET /path`.
    pub line: String,
    fields: Vec<String>,
}

impl Head {
    /// None where the client went away without a word.
    pub fn read(reader: &mut impl BufRead) -> Result<Option<Self>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.trim() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let mut lines = lines.into_iter();
        let Some(first) = lines.next() else { return Ok(None) };
        Ok(Some(Self { line: first.trim_end_matches(" HTTP/1.1").to_owned(), fields: lines.collect() }))
    }

    /// The value of a field, whatever the case of its name.
    pub fn field(&self, name: &str) -> Option<String> {
        let fields = self.fields.iter().filter_map(|field| field.split_once(':'));
        fields.into_iter().find_map(|(key, value)| key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned()))
    }
}
