//! Credentials for registries, from where `docker login` keeps them: `config.json` in
//! `$DOCKER_CONFIG` or `~/.docker`, and the helper programs that it names.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use crate::oci::error::Error;

/// What the configuration calls Docker's own registry.
const DOCKER_HUB: &str = "index.docker.io";

/// As a user name it says that the secret is a token to get others with.
const TOKEN_USER: &str = "<token>";

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    /// A user's name and password.
    Basic(String, String),
    /// An OAuth 2 refresh token.
    Token(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Config {
    auths: HashMap<String, Auth>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "lowercase")]
struct Auth {
    auth: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

impl Credentials {
    /// What the user has for the registry at `host`, if anything.
    pub(crate) fn of_user(host: &str) -> Result<Option<Self>, Error> {
        let directory = env::var_os("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".docker")));
        let Some(path) = directory.map(|directory| directory.join("config.json")) else {
            return Ok(None);
        };
        match fs::read(&path) {
            Ok(text) => Self::find(&text, host).map_err(|reason| Error::Credentials {
                registry: host.to_owned(),
                reason: format!("{}: {reason}", path.display()),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read the file", &path)(error)),
        }
    }

    fn find(config: &[u8], host: &str) -> Result<Option<Self>, String> {
        let config: Config = serde_json::from_slice(config).map_err(|e| e.to_string())?;
        let host = if host == "docker.io" {
            DOCKER_HUB
        } else {
            host
        };
        let helper = of_host(&config.cred_helpers, host).map(|(_, helper)| helper);
        let entry = of_host(&config.auths, host);
        if let Some(helper) = helper.or(config.creds_store.as_ref()) {
            let server = entry.map_or(host, |(key, _)| key);
            return ask(helper, server);
        }
        let Some((_, entry)) = entry else {
            return Ok(None);
        };
        if let Some(token) = entry
            .identitytoken
            .as_ref()
            .filter(|token| !token.is_empty())
        {
            return Ok(Some(Self::Token(token.clone())));
        }
        let Some(auth) = entry.auth.as_ref().filter(|auth| !auth.is_empty()) else {
            return Ok(None);
        };
        let pair = BASE64_STANDARD.decode(auth).map_err(|e| e.to_string())?;
        let pair = String::from_utf8(pair).map_err(|_| "'auth' is not UTF-8".to_owned())?;
        let (user, password) = pair.split_once(':').ok_or("'auth' has no password")?;
        Ok(Some(Self::Basic(user.to_owned(), password.to_owned())))
    }
}

/// The entry for `host`; keys may be URLs, as `https://index.docker.io/v1/` is.
fn of_host<'a, T>(map: &'a HashMap<String, T>, host: &str) -> Option<(&'a str, &'a T)> {
    let (key, value) = map.get_key_value(host).or_else(|| {
        map.iter().find(|(key, _)| {
            let key = key
                .trim_start_matches("https://")
                .trim_start_matches("http://");
            key.split('/').next() == Some(host)
        })
    })?;
    Some((key, value))
}

/// Asks a helper program by its protocol: the server on its input, JSON on its output.
fn ask(helper: &str, server: &str) -> Result<Option<Credentials>, String> {
    let program = format!("docker-credential-{helper}");
    let failed = |error: io::Error| format!("{program}: {error}");
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        // one that ends without reading says why by its status
        let _ = input.write_all(server.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return if said.contains("credentials not found") {
            Ok(None)
        } else {
            Err(format!("{program}: {}", said.trim()))
        };
    }
    let answer: Answer =
        serde_json::from_str(&said).map_err(|error| format!("{program}: {error}"))?;
    Ok(Some(if answer.username == TOKEN_USER {
        Credentials::Token(answer.secret)
    } else {
        Credentials::Basic(answer.username, answer.secret)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(config: &str, host: &str) -> Result<Option<Credentials>, String> {
        Credentials::find(config.as_bytes(), host)
    }

    #[test]
    fn credentials_are_found_by_host() {
        // "me:pass:word"
        let config = r#"{"auths": {
            "registry.example:5000": {"auth": "bWU6cGFzczp3b3Jk"},
            "https://index.docker.io/v1/": {"auth": "bWU6cGFzczp3b3Jk"},
            "token.example": {"auth": "bWU6", "identitytoken": "T"},
            "empty.example": {}}}"#;
        let basic = Some(Credentials::Basic("me".into(), "pass:word".into()));
        assert_eq!(find(config, "registry.example:5000"), Ok(basic.clone()));
        assert_eq!(find(config, "docker.io"), Ok(basic));
        let token = Some(Credentials::Token("T".into()));
        assert_eq!(find(config, "token.example"), Ok(token));
        for host in ["registry.example", "empty.example", "other.example"] {
            assert_eq!(find(config, host), Ok(None));
        }
    }

    #[test]
    fn a_damaged_configuration_is_an_error() {
        for config in ["", "{", r#"{"auths": {"h": {"auth": "%"}}}"#] {
            assert!(find(config, "h").is_err(), "{config}");
        }
        let missing = r#"{"credHelpers": {"h": "strata-no-such"}}"#;
        assert!(
            find(missing, "h")
                .unwrap_err()
                .contains("docker-credential-strata-no-such")
        );
        assert_eq!(find(missing, "other"), Ok(None));
    }
}
