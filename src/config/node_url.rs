//! Where a node listens: `http://host:port`, and nothing more.
//!
//! A node is a plain Chroma server, so its address has no path, no credentials and no TLS; each of those is refused with
//! its own sentence, since whoever wrote it expected it to work. The port is required: Chroma's 8000 and HTTP's 80 are
//! both a guess. The name is not resolved here. Names move; health looks them up again (design, section 9).

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use url::{Host, Url};

/// The address of one Chroma server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeUrl {
    url: Url,
}

impl NodeUrl {
    /// Reads `http://host:port`.
    ///
    /// # Errors
    /// A sentence about the part that is wrong. Credentials are never repeated in it.
    pub fn parse(text: &str) -> Result<Self, String> {
        const FORM: &str = "write http://host:port, as in `http://127.0.0.1:8001`";
        let url = Url::parse(text.trim()).map_err(|e| format!("not a URL ({e}): {FORM}"))?;
        match url.scheme() {
            "http" => {}
            "https" => return Err(format!("TLS to nodes isn't supported: {FORM}")),
            scheme => return Err(format!("`{scheme}` is not a scheme for a node: {FORM}")),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(format!("credentials in a node's URL aren't supported: {FORM}"));
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(format!("a node's URL ends after the port: {FORM}"));
        }
        // `Url` drops :80 as the default port, so whether one was written is asked of the text.
        let authority = text.trim().split("//").nth(1).unwrap_or_default().trim_end_matches('/');
        let port = authority.rsplit_once(':').map_or("", |(_, port)| port);
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("the port is missing: {FORM}"));
        }
        match url.port_or_known_default() {
            Some(0) | None => Err(format!("port 0 is no port: {FORM}")),
            Some(_) => Ok(Self { url }),
        }
    }

    pub(super) fn loopback(port: u16) -> Self {
        Self::parse(&format!("http://127.0.0.1:{port}")).expect("a loopback address with a port is a node's URL")
    }

    /// The host: a name, not yet resolved, or an address.
    pub fn host(&self) -> Host<&str> {
        self.url.host().unwrap_or(Host::Domain(""))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.url.port_or_known_default().unwrap_or_default()
    }

    /// `host:port` (an IPv6 address in brackets), as for a `Host` header or a resolver.
    pub fn authority(&self) -> String {
        format!("{}:{}", self.host(), self.port())
    }

    /// Whether the host can only be this machine.
    pub fn is_this_host(&self) -> bool {
        match self.host() {
            Host::Domain(name) => {
                let name = name.trim_end_matches('.');
                name == "localhost" || name.ends_with(".localhost")
            }
            Host::Ipv4(ip) => ip.is_loopback() || ip.is_unspecified(),
            Host::Ipv6(ip) => ip.to_canonical().is_loopback() || ip.is_unspecified(),
        }
    }

    /// What two spellings of one server have in common: `localhost`, `127.0.0.1`, `[::1]` and `0.0.0.0` are one host.
    /// `127.0.0.2` is not: binding nodes to loopback addresses of their own is a way to run several on one port.
    pub(super) fn same_server_key(&self) -> (String, u16) {
        let host = match self.host() {
            Host::Domain(name) => name.trim_end_matches('.').to_owned(),
            Host::Ipv4(ip) => ip.to_string(),
            Host::Ipv6(ip) => ip.to_canonical().to_string(),
        };
        let one = matches!(host.as_str(), "127.0.0.1" | "::1" | "0.0.0.0" | "::") || host.ends_with("localhost");
        (
            if one && self.is_this_host() {
                "localhost".to_owned()
            } else {
                host
            },
            self.port(),
        )
    }
}

impl fmt::Display for NodeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority())
    }
}

impl std::str::FromStr for NodeUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text)
    }
}

impl<'de> Deserialize<'de> for NodeUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::units::scalar(deserializer, Self::parse)
    }
}

impl Serialize for NodeUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> NodeUrl {
        NodeUrl::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn host_and_port_come_apart() {
        for (text, authority) in [
            ("http://127.0.0.1:8001", "127.0.0.1:8001"),
            ("http://Chroma-A.internal:8000/", "chroma-a.internal:8000"),
            ("http://[::1]:8000", "[::1]:8000"),
            ("http://node:80", "node:80"),
        ] {
            assert_eq!(url(text).authority(), authority);
            assert_eq!(url(text).to_string(), format!("http://{authority}"));
        }
        assert_eq!(url("http://node:80").port(), 80);
    }

    #[test]
    fn what_a_node_cannot_have_is_said() {
        for (text, part) in [
            ("https://node:8000", "TLS to nodes isn't supported"),
            ("ftp://node:21", "`ftp` is not a scheme"),
            ("node:8000", "`node` is not a scheme"),
            ("127.0.0.1:8000", "not a URL"),
            ("", "not a URL"),
            ("http://", "not a URL"),
            ("http://node", "port is missing"),
            ("http://node:", "port is missing"),
            ("http://[::1]", "port is missing"),
            ("http://node:0", "port 0"),
            ("http://node:99999", "not a URL"),
            ("http://node:8000/api/v2", "ends after the port"),
            ("http://node:8000?a=1", "ends after the port"),
            ("http://user:hunter2@node:8000", "credentials"),
        ] {
            let error = NodeUrl::parse(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
            assert!(error.contains("http://127.0.0.1:8001"), "{text}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn spellings_of_this_host_are_one_server() {
        let localhost = url("http://localhost:8001").same_server_key();
        for text in [
            "http://127.0.0.1:8001",
            "http://LOCALHOST.:8001",
            "http://[::1]:8001",
            "http://0.0.0.0:8001",
        ] {
            assert_eq!(url(text).same_server_key(), localhost, "{text}");
        }
        for text in [
            "http://127.0.0.2:8001",
            "http://127.0.0.1:8002",
            "http://notlocalhost:8001",
        ] {
            assert_ne!(url(text).same_server_key(), localhost, "{text}");
        }
    }
}
