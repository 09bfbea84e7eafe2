//! Who may use what is under `/admin/`.
//!
//! With a token: whoever shows it. Without: whoever reaches the port, which then has to be on a loopback address. A
//! browser on that host reaches it too, on behalf of any page it shows, so a request that a browser made for another
//! site is refused: it names its origin, or a host that is none of ours (DNS rebinding).

use std::net::IpAddr;

use http::{HeaderMap, header};

use crate::chroma::Refusal;
use crate::config::Admin as Config;

/// The rule for one admin port.
#[derive(Debug, Clone)]
pub enum Guard {
    /// No verbs: anybody could reach them.
    Closed,
    /// The port is on loopback and there is no token.
    Local,
    Token(String),
}

impl Guard {
    pub fn of(config: &Config) -> Self {
        match (&config.token, config.address) {
            (Some(token), _) => Self::Token(token.clone()),
            (None, Some(address)) if address.ip().is_loopback() => Self::Local,
            _ => Self::Closed,
        }
    }

    /// Whether a request may go on.
    ///
    /// # Errors
    /// What it is answered otherwise.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let text = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let foreign = text(header::ORIGIN).is_some_and(|origin| {
            let of = origin.split_once("://").map_or(origin, |(_, host)| host);
            Some(of) != text(header::HOST)
        });
        if foreign {
            return Err(forbidden("The request was made on behalf of another site."));
        }
        match self {
            Self::Closed => Err(forbidden(
                "The verbs are off: the admin address is not loopback and there is no admin.token.",
            )),
            Self::Local if text(header::HOST).is_none_or(is_local) => Ok(()),
            Self::Local => Err(forbidden(
                "Without admin.token, only requests to this host's own names are answered.",
            )),
            Self::Token(token) => {
                let given = text(header::AUTHORIZATION).and_then(|value| value.split_once(' '));
                match given {
                    Some((scheme, given)) if scheme.eq_ignore_ascii_case("bearer") && same(given.trim(), token) => {
                        Ok(())
                    }
                    _ => {
                        let message = "Send `Authorization: Bearer` with the admin.token.";
                        Err(refusal(401, message))
                    }
                }
            }
        }
    }
}

fn forbidden(message: &'static str) -> Refusal {
    refusal(403, message)
}

fn refusal(status: u16, message: &'static str) -> Refusal {
    Refusal {
        status,
        error: "AuthError",
        message: message.to_owned(),
    }
}

/// `localhost` or a loopback address, with or without a port.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// Takes as long for a wrong text as for the right one of the same length.
fn same(given: &str, expected: &str) -> bool {
    given.len() == expected.len() && given.bytes().zip(expected.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn status(guard: &Guard, headers: &[(header::HeaderName, &'static str)]) -> u16 {
        let headers = headers
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_static(value)))
            .collect();
        guard.check(&headers).map_or_else(|answer| answer.status, |()| 200)
    }

    #[test]
    fn a_token_has_to_be_shown() {
        let guard = Guard::Token("s3cret".to_owned());
        assert_eq!(status(&guard, &[]), 401);
        assert_eq!(status(&guard, &[(header::AUTHORIZATION, "Bearer s3cres")]), 401);
        assert_eq!(status(&guard, &[(header::AUTHORIZATION, "Basic s3cret")]), 401);
        assert_eq!(status(&guard, &[(header::AUTHORIZATION, "bearer s3cret")]), 200);
        let remote = [
            (header::AUTHORIZATION, "Bearer s3cret"),
            (header::HOST, "proxy.example:8900"),
        ];
        assert_eq!(status(&guard, &remote), 200);
    }

    #[test]
    fn without_a_token_only_this_host_is_served() {
        assert_eq!(status(&Guard::Closed, &[(header::HOST, "127.0.0.1:8900")]), 403);
        for (host, expected) in [
            ("127.0.0.1:8900", 200),
            ("localhost", 200),
            ("[::1]:8900", 200),
            ("evil.example:8900", 403),
            ("10.0.0.1:8900", 403),
        ] {
            assert_eq!(status(&Guard::Local, &[(header::HOST, host)]), expected, "{host}");
        }
    }

    #[test]
    fn a_page_of_another_site_is_refused() {
        let from = |origin| [(header::HOST, "localhost:8900"), (header::ORIGIN, origin)];
        assert_eq!(status(&Guard::Local, &from("http://evil.example")), 403);
        assert_eq!(status(&Guard::Local, &from("null")), 403);
        assert_eq!(status(&Guard::Local, &from("http://localhost:8900")), 200);
    }

    #[test]
    fn the_rule_follows_the_configuration() {
        let config = |address: &str, token: Option<&str>| Config {
            address: address.parse().ok(),
            token: token.map(str::to_owned),
        };
        assert!(matches!(Guard::of(&config("127.0.0.1:1", None)), Guard::Local));
        assert!(matches!(Guard::of(&config("0.0.0.0:1", None)), Guard::Closed));
        assert!(matches!(Guard::of(&config("0.0.0.0:1", Some("t"))), Guard::Token(_)));
    }
}
