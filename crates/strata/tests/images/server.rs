//! A registry for the tests that can be told to misbehave.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use strata_image::oci::Digest;

use crate::content::Content;

/// How it behaves.
#[derive(Default)]
pub(crate) struct Behaviour {
    /// Answers to blobs end after this many bytes, but for the last ones of a blob.
    pub(crate) cut_after: Option<usize>,
    /// Requests for ranges are answered with everything.
    pub(crate) ignores_ranges: bool,
    /// Every blob has a wrong byte at its end.
    pub(crate) damages: bool,
    /// What `WWW-Authenticate` asks for; `{host}` becomes the server's address.
    pub(crate) challenge: Option<&'static str>,
    /// What `Authorization` has to be, if there is a challenge.
    pub(crate) authorization: &'static str,
    /// What `Authorization` has to be where tokens are given; nobody needs any without it.
    pub(crate) token_authorization: Option<&'static str>,
}

/// A registry with one repository, `test`, on this host. It serves until the tests end.
pub(crate) struct Server {
    pub(crate) host: String,
    log: Arc<Mutex<Vec<String>>>,
}

struct State {
    host: String,
    behaviour: Behaviour,
    documents: BTreeMap<String, Vec<u8>>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Serves the image as `test:1`, and as `test:index` by way of an index.
    pub(crate) fn start(content: &Content, behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let mut documents = BTreeMap::new();
        let digest = Digest::of(&content.manifest);
        for tag in ["1", &digest.to_string()] {
            let path = format!("/v2/test/manifests/{tag}");
            documents.insert(path, content.manifest.clone());
        }
        documents.insert("/v2/test/manifests/index".into(), content.index());
        for (digest, blob) in &content.blobs {
            documents.insert(format!("/v2/test/blobs/{digest}"), blob.clone());
        }
        let log = Arc::new(Mutex::new(Vec::new()));
        let state = Arc::new(State {
            host: host.clone(),
            behaviour,
            documents,
            log: Arc::clone(&log),
        });
        thread::spawn(move || {
            for connection in listener.incoming() {
                let state = Arc::clone(&state);
                thread::spawn(move || drop(state.serve(&connection.unwrap())));
            }
        });
        Self { host, log }
    }

    /// Requests so far that have `text` in their first line or their range.
    pub(crate) fn requests(&self, text: &str) -> usize {
        let log = self.log.lock().unwrap();
        log.iter().filter(|line| line.contains(text)).count()
    }
}

impl State {
    /// Answers one request and closes the connection.
    fn serve(&self, connection: &TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(connection.try_clone()?).lines();
        // What wants TLS does not begin with a line of text.
        let first = lines.next().transpose()?.unwrap_or_default();
        let Some(path) = first.split(' ').nth(1).map(str::to_owned) else {
            return Ok(());
        };
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let range = headers.get("range").cloned().unwrap_or_default();
        self.log.lock().unwrap().push(format!("{first} {range}"));
        let authorization = headers.get("authorization").map_or("", |text| text);
        self.answer(connection, &path, &range, authorization)
    }

    fn answer(
        &self,
        mut to: &TcpStream,
        path: &str,
        range: &str,
        authorization: &str,
    ) -> std::io::Result<()> {
        let behaviour = &self.behaviour;
        if path.starts_with("/token") {
            let wanted = behaviour.token_authorization.unwrap_or_default();
            let status = if authorization == wanted {
                "200 OK"
            } else {
                "403 Forbidden"
            };
            let scope = path.contains("scope=repository%3Atest%3Apull");
            assert!(scope && path.contains("service=here"), "{path}");
            let body = r#"{"token": "T"}"#;
            return write!(to, "HTTP/1.1 {status}\r\ncontent-length: 14\r\n\r\n{body}");
        }
        if let Some(challenge) = behaviour.challenge
            && authorization != behaviour.authorization
        {
            let challenge = challenge.replace("{host}", &self.host);
            let head = "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close";
            return write!(to, "{head}\r\nwww-authenticate: {challenge}\r\n\r\n");
        }
        let Some(document) = self.documents.get(path) else {
            let head = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close";
            return write!(to, "{head}\r\n\r\n");
        };
        let mut document = document.clone();
        let is_blob = path.contains("/blobs/");
        if behaviour.damages
            && is_blob
            && let Some(last) = document.last_mut()
        {
            *last ^= 1;
        }
        let from: Option<usize> = range
            .strip_prefix("bytes=")
            .and_then(|range| range.strip_suffix('-'))
            .and_then(|from| from.parse().ok());
        let (status, rest) = match from {
            Some(from) if !behaviour.ignores_ranges => ("206 Partial Content", &document[from..]),
            _ => ("200 OK", &document[..]),
        };
        let sent = match behaviour.cut_after {
            Some(most) if is_blob && rest.len() > most => &rest[..most],
            _ => rest,
        };
        let length = rest.len();
        write!(
            to,
            "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
        )?;
        to.write_all(sent)
    }
}
