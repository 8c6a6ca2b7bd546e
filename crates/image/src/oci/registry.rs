//! Images in a registry, by the OCI distribution specification and Docker's token protocol.

use std::io::Read;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use oci_spec::distribution::Reference;
use serde::Deserialize;
use ureq::http::{Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::oci::credentials::Credentials;
use crate::oci::digest::Digest;
use crate::oci::error::Error;
use crate::oci::layout::MAX_DOCUMENT;
use crate::oci::source::{self, Found, FoundLayer, Name, Origin};

/// Where Docker's own registry really is.
const DOCKER_HUB: &str = "registry-1.docker.io";

/// The kinds of manifest that are understood.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// How long the other side may say nothing.
const SILENCE: Duration = Duration::from_secs(30);

/// Most that is kept of what a registry says about an error, bytes.
const MAX_MESSAGE: u64 = 4096;

/// One image of a registry.
pub(crate) struct Registry {
    client: Client,
    found: Found,
}

impl Registry {
    pub(crate) fn open(name: &Name) -> Result<Self, Error> {
        let reference = name.reference();
        let client = Client::new(reference);
        let wanted = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_owned(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let what = format!("image '{}'", name.familiar());
        let mut manifest = client.document(&format!("manifests/{wanted}"), &what)?;
        if let Ok(digest) = wanted.parse::<Digest>() {
            check(&manifest, digest, "manifest")?;
        }
        if source::is_index(&manifest) {
            let digest = source::choose(&manifest)?;
            manifest = client.document(&format!("manifests/{digest}"), &what)?;
            check(&manifest, digest, "manifest")?;
        }
        let parsed = source::parse_manifest(&manifest)?;
        let digest = source::digest(parsed.config().digest())?;
        let config = client.document(&format!("blobs/{digest}"), "its configuration")?;
        check(&config, digest, "configuration")?;
        Ok(Self {
            found: Found::new(Some(name.clone()), manifest, config)?,
            client,
        })
    }
}

fn check(document: &[u8], digest: Digest, what: &str) -> Result<(), Error> {
    if Digest::of(document) == digest {
        return Ok(());
    }
    Err(Error::BadImage(format!(
        "its {what} is not the one with digest {digest}"
    )))
}

impl Origin for Registry {
    fn found(&self) -> &Found {
        &self.found
    }

    fn layer(&self, layer: &FoundLayer, offset: u64) -> Result<Box<dyn Read + Send + '_>, Error> {
        let path = format!("blobs/{}", layer.digest.unwrap_or(layer.diff_id));
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        let response = self.client.get(&path, "the layer", range.as_deref())?;
        let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
        let mut body = response.into_body().into_reader();
        if offset > 0 && !is_part {
            // It does not know ranges: what is here already passes once more.
            let skipped = std::io::copy(&mut (&mut body).take(offset), &mut std::io::sink());
            skipped.map_err(Error::Data)?;
        }
        Ok(Box::new(body))
    }

    fn is_remote(&self) -> bool {
        true
    }
}

/// Talks to one repository of a registry.
struct Client {
    agent: Agent,
    host: String,
    repository: String,
    /// With what requests begin: `https://host/v2/repository/`.
    base: String,
    /// The `Authorization` that worked last.
    authorization: Mutex<Option<String>>,
}

impl Client {
    fn new(reference: &Reference) -> Self {
        let host = reference.registry();
        let address = if host == "docker.io" {
            DOCKER_HUB
        } else {
            host
        };
        let agent: Agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("strata/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(SILENCE))
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .tls_config(tls())
            .build()
            .into();
        let scheme = scheme(&agent, address);
        let repository = reference.repository().to_owned();
        Self {
            agent,
            host: host.to_owned(),
            base: format!("{scheme}://{address}/v2/{repository}/"),
            repository,
            authorization: Mutex::new(None),
        }
    }

    /// A manifest or configuration.
    fn document(&self, path: &str, what: &str) -> Result<Vec<u8>, Error> {
        let response = self.get(path, what, None)?;
        let mut body = response.into_body();
        let body = body.with_config().limit(MAX_DOCUMENT);
        body.read_to_vec().map_err(|error| self.unreachable(error))
    }

    /// Asks for `path`, as somebody with credentials if it has to be.
    fn get(&self, path: &str, what: &str, range: Option<&str>) -> Result<Response<Body>, Error> {
        let url = format!("{}{path}", self.base);
        let first = self.ask(&url, range)?;
        if first.status() != StatusCode::UNAUTHORIZED {
            return self.accept(first, what);
        }
        let challenge = first.headers().get("www-authenticate");
        let challenge = challenge.and_then(|text| text.to_str().ok()).unwrap_or("");
        let authorization = self.authorize(challenge, what)?;
        *self.authorization() = Some(authorization);
        self.accept(self.ask(&url, range)?, what)
    }

    fn ask(&self, url: &str, range: Option<&str>) -> Result<Response<Body>, Error> {
        let mut request = self.agent.get(url).header("accept", MANIFESTS);
        if let Some(authorization) = &*self.authorization() {
            request = request.header("authorization", authorization);
        }
        if let Some(range) = range {
            request = request.header("range", range);
        }
        request.call().map_err(|error| self.unreachable(error))
    }

    fn authorization(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, mut response: Response<Body>, what: &str) -> Result<Response<Body>, Error> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let said = response
            .body_mut()
            .with_config()
            .limit(MAX_MESSAGE)
            .read_to_string();
        let detail = format!("{status}{}", message(&said.unwrap_or_default()));
        let registry = self.host.clone();
        let what = what.to_owned();
        Err(match status {
            StatusCode::NOT_FOUND => Error::NotFound {
                what,
                place: format!("in the registry {registry}"),
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Denied {
                registry,
                what,
                detail,
            },
            _ => Error::Refused {
                registry,
                what,
                detail,
            },
        })
    }

    fn unreachable(&self, error: ureq::Error) -> Error {
        Error::Unreachable {
            registry: self.host.clone(),
            source: Box::new(error),
        }
    }

    /// What to say in `Authorization`, as the registry's challenge wants it (RFC 7235 §4.1, and
    /// "Token Authentication Specification" of the distribution project).
    fn authorize(&self, challenge: &str, what: &str) -> Result<String, Error> {
        let credentials = Credentials::of_user(&self.host)?;
        let denied = |detail: &str| Error::Denied {
            registry: self.host.clone(),
            what: what.to_owned(),
            detail: detail.to_owned(),
        };
        let (scheme, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
        match (scheme.to_ascii_lowercase().as_str(), credentials) {
            ("basic", Some(Credentials::Basic(user, password))) => Ok(basic(&user, &password)),
            ("basic", _) => Err(denied("there is no password for it")),
            ("bearer", credentials) => {
                let parameters = parameters_of(parameters);
                let value = |name: &str| parameters.iter().find(|(key, _)| key == name);
                let realm = value("realm").ok_or_else(|| denied("its challenge has no realm"))?;
                self.token(
                    &realm.1,
                    value("service").map(|s| &*s.1),
                    credentials.as_ref(),
                    what,
                )
            }
            _ => Err(denied("it asks in a way that is not understood")),
        }
    }

    /// Gets a token to pull with.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        credentials: Option<&Credentials>,
        what: &str,
    ) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let scope = format!("repository:{}:pull", self.repository);
        let mut query = vec![("scope", scope.as_str())];
        query.extend(service.map(|service| ("service", service)));
        let sent = match credentials {
            Some(Credentials::Token(token)) => {
                query.extend([
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token),
                    ("client_id", "strata"),
                ]);
                self.agent.post(realm).send_form(query)
            }
            Some(Credentials::Basic(user, password)) => self
                .agent
                .get(realm)
                .query_pairs(query)
                .header("authorization", basic(user, password))
                .call(),
            None => self.agent.get(realm).query_pairs(query).call(),
        };
        let response = self.accept(sent.map_err(|error| self.unreachable(error))?, what)?;
        let mut body = response.into_body();
        let body = body.with_config().limit(MAX_DOCUMENT).read_to_vec();
        let body = body.map_err(|error| self.unreachable(error))?;
        let answer: Option<Answer> = serde_json::from_slice(&body).ok();
        let token = answer.and_then(|answer| answer.token.or(answer.access_token));
        let token = token.ok_or_else(|| Error::Refused {
            registry: self.host.clone(),
            what: what.to_owned(),
            detail: "it gives no token".to_owned(),
        })?;
        Ok(format!("Bearer {token}"))
    }
}

/// The host's own certificates, or those of Mozilla where it has none.
fn tls() -> TlsConfig {
    let found = rustls_native_certs::load_native_certs();
    let certificates: Vec<Certificate<'static>> = found
        .certs
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    let roots = if certificates.is_empty() {
        RootCerts::WebPki
    } else {
        RootCerts::Specific(Arc::new(certificates))
    };
    TlsConfig::builder().root_certs(roots).build()
}

/// As Docker has it: a registry on this very host may do without TLS.
fn scheme(agent: &Agent, address: &str) -> &'static str {
    if is_loopback(address) && agent.get(format!("https://{address}/v2/")).call().is_err() {
        "http"
    } else {
        "https"
    }
}

fn is_loopback(address: &str) -> bool {
    let host = match address.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => address,
    };
    let is_address = |ip: IpAddr| ip.is_loopback();
    host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(is_address)
}

fn basic(user: &str, password: &str) -> String {
    let pair = BASE64_STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {pair}")
}

/// Reads `key="value",key=value`.
fn parameters_of(mut text: &str) -> Vec<(String, String)> {
    let mut parameters = Vec::new();
    while let Some((key, rest)) = text.split_once('=') {
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_at(rest.find(',').unwrap_or(rest.len())),
        };
        let key = key.trim_matches([' ', ',']).to_ascii_lowercase();
        parameters.push((key, value.to_owned()));
        text = rest;
    }
    parameters
}

/// What a registry says of an error, if it says it as the specification has it.
fn message(body: &str) -> String {
    #[derive(Deserialize)]
    struct Said {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        message: String,
    }
    let said: Option<Said> = serde_json::from_str(body).ok();
    let first = said.and_then(|said| said.errors.into_iter().next());
    let text = first.map_or(String::new(), |one| one.message);
    match text.as_str() {
        "" => String::new(),
        text => format!(", {}", text.escape_debug()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_with_quotes_or_without() {
        let text = r#"realm="https://auth.example/token?a=b,c",service=reg, Scope="x y""#;
        let expected = [
            ("realm", "https://auth.example/token?a=b,c"),
            ("service", "reg"),
            ("scope", "x y"),
        ];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(parameters_of(text), expected);
        assert!(parameters_of("").is_empty());
        assert_eq!(parameters_of("a=\"b").len(), 1);
    }

    #[test]
    fn only_this_host_may_do_without_tls() {
        for address in [
            "localhost",
            "localhost:5000",
            "127.0.0.1",
            "127.1.2.3:80",
            "[::1]:5000",
        ] {
            assert!(is_loopback(address), "{address}");
        }
        for address in [
            "docker.io",
            "localhost.example:5000",
            "10.0.0.1:5000",
            "128.0.0.1",
        ] {
            assert!(!is_loopback(address), "{address}");
        }
    }

    #[test]
    fn what_a_registry_says_is_told_without_control_characters() {
        let body = r#"{"errors": [{"code": "DENIED", "message": "no\u001b[2Jaccess"}]}"#;
        assert_eq!(message(body), ", no\\u{1b}[2Jaccess");
        assert_eq!(message("<html>"), "");
    }
}
