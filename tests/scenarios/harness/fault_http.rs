//! Just enough HTTP/1.1 to pass whole messages on byte for byte: where a head ends, how long a body is.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// A message as it came off the wire. `raw` is head and body with their framing; `body` is the decoded body.
#[derive(Clone, Debug, Default)]
pub struct Message {
    pub first_line: String,
    pub headers: Vec<(String, String)>,
    pub raw: Vec<u8>,
    pub body: Vec<u8>,
}

impl Message {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// Whether a header's list of tokens has this one.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.headers
            .iter()
            .filter(|(key, _)| key == name)
            .any(|(_, value)| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    }

    fn status(&self) -> u16 {
        self.first_line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .unwrap_or(0)
    }
}

/// The head of a message; `None` at the end of the connection.
pub async fn read_head<R: AsyncBufRead + Unpin>(from: &mut R) -> io::Result<Option<Message>> {
    let mut message = Message::default();
    loop {
        let start = message.raw.len();
        if from.read_until(b'\n', &mut message.raw).await? == 0 {
            return if start == 0 {
                Ok(None)
            } else {
                Err(io::ErrorKind::UnexpectedEof.into())
            };
        }
        let line = String::from_utf8_lossy(&message.raw[start..]).trim_end().to_owned();
        match (start, line.split_once(':')) {
            (0, _) => message.first_line = line,
            (_, Some((key, value))) => message
                .headers
                .push((key.to_ascii_lowercase(), value.trim().to_owned())),
            _ if line.is_empty() => return Ok(Some(message)),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, line)),
        }
    }
}

/// Reads the body that belongs to the head; a response without any length ends with its connection.
pub async fn read_body<R: AsyncBufRead + Unpin>(from: &mut R, message: &mut Message, to_end: bool) -> io::Result<()> {
    if message.has_token("transfer-encoding", "chunked") {
        return read_chunks(from, message).await;
    }
    if let Some(length) = message.header("content-length").and_then(|v| v.parse::<usize>().ok()) {
        message.body = vec![0; length];
        from.read_exact(&mut message.body).await?;
    } else if to_end {
        from.read_to_end(&mut message.body).await?;
    }
    message.raw.extend_from_slice(&message.body);
    Ok(())
}

async fn read_chunks<R: AsyncBufRead + Unpin>(from: &mut R, message: &mut Message) -> io::Result<()> {
    loop {
        let start = message.raw.len();
        if from.read_until(b'\n', &mut message.raw).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = String::from_utf8_lossy(&message.raw[start..]).trim().to_owned();
        let size = usize::from_str_radix(line.split(';').next().unwrap_or("").trim(), 16)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, line))?;
        let start = message.raw.len();
        message.raw.resize(start + size + 2, 0);
        // After the last chunk this takes the empty line; Chroma and Diptych send no trailers.
        from.read_exact(&mut message.raw[start..]).await?;
        message.body.extend_from_slice(&message.raw[start..start + size]);
        if size == 0 {
            return Ok(());
        }
    }
}

/// A whole response to a request with this method.
pub async fn read_response<R: AsyncBufRead + Unpin>(from: &mut R, method: &str) -> io::Result<Message> {
    loop {
        let mut response = read_head(from).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = response.status();
        if (100..200).contains(&status) {
            continue;
        }
        if method != "HEAD" && status != 204 && status != 304 {
            read_body(from, &mut response, true).await?;
        }
        return Ok(response);
    }
}
