//! HTTP messages on the wire.

use std::io::{self, BufRead, Read as _, Write as _};

/// Encodes a request.
pub fn encode_request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n").into_bytes();
    for (name, value) in headers {
        write!(bytes, "{name}: {value}\r\n").unwrap();
    }
    let chunked = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("transfer-encoding"));
    if !chunked && (method == "POST" || !body.is_empty()) {
        write!(bytes, "Content-Length: {}\r\n", body.len()).unwrap();
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

/// A response.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Names are in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, with its transfer coding removed.
    pub body: Vec<u8>,
}

impl Answer {
    /// Reads one response to a request with this method.
    pub fn read_from(reader: &mut impl BufRead, method: &str) -> io::Result<Self> {
        loop {
            let (line, headers) = head(reader)?;
            let mut words = line.split(' ');
            let (version, status) = (words.next(), words.next());
            let status = status.and_then(|status| status.parse().ok());
            let (Some("HTTP/1.1" | "HTTP/1.0"), Some(status)) = (version, status) else {
                return Err(malformed(&line));
            };
            if status == 100 {
                continue;
            }
            let body = match Framing::of(&headers)? {
                _ if method == "HEAD" || status == 204 || status == 304 => Vec::new(),
                Some(framing) => framing.body(reader)?,
                None => {
                    let mut body = Vec::new();
                    reader.read_to_end(&mut body)?;
                    body
                }
            };
            return Ok(Self { status, headers, body });
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {} {:?}", self.status, self.text()))
    }

    /// Returns the `message` of a JSON body.
    pub fn message(&self) -> String {
        let answer = self.json();
        let message = answer["message"].as_str();
        message.unwrap_or_else(|| panic!("no message: {} {answer}", self.status)).to_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(its, _)| its == name).map(|(_, value)| value.as_str())
    }

    /// Fails unless the response has this status.
    pub fn of_status(&self, status: u16) -> &Self {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self
    }
}

/// A request as a server reads it.
#[derive(Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn read_from(reader: &mut impl BufRead) -> io::Result<Self> {
        let (line, headers) = head(reader)?;
        let mut words = line.split(' ');
        let (Some(method), Some(path)) = (words.next(), words.next()) else {
            return Err(malformed(&line));
        };
        let body = match Framing::of(&headers)? {
            Some(framing) => framing.body(reader)?,
            None => Vec::new(),
        };
        Ok(Self { method: method.to_owned(), path: path.to_owned(), headers, body })
    }
}

/// How the end of a body is determined.
enum Framing {
    Length(usize),
    Chunks,
}

impl Framing {
    fn of(headers: &[(String, String)]) -> io::Result<Option<Self>> {
        let find = |name| headers.iter().find(|(its, _)| its == name).map(|(_, value)| value);
        if find("transfer-encoding").is_some_and(|coding| coding == "chunked") {
            return Ok(Some(Self::Chunks));
        }
        let length = find("content-length");
        length
            .map(|length| length.parse().map(Self::Length).map_err(|_| malformed(length)))
            .transpose()
    }

    fn body(self, reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
        match self {
            Self::Length(length) => exactly(reader, length),
            Self::Chunks => {
                let mut body = Vec::new();
                loop {
                    let size = line(reader)?;
                    let size = size.split(';').next().unwrap_or_default();
                    let size = usize::from_str_radix(size, 16).map_err(|_| malformed(size))?;
                    body.append(&mut exactly(reader, size)?);
                    let end = line(reader)?;
                    if !end.is_empty() {
                        return Err(malformed(&end));
                    }
                    if size == 0 {
                        return Ok(body);
                    }
                }
            }
        }
    }
}

fn exactly(reader: &mut impl BufRead, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

fn head(reader: &mut impl BufRead) -> io::Result<(String, Vec<(String, String)>)> {
    let first = line(reader)?;
    let mut headers = Vec::new();
    loop {
        let header = line(reader)?;
        if header.is_empty() {
            return Ok((first, headers));
        }
        let (name, value) = header.split_once(':').ok_or_else(|| malformed(&header))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

/// Reads a line, without the line end.
fn line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let line = line.strip_suffix('\n').ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(line.trim_end_matches('\r').to_owned())
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {what:?}"))
}
