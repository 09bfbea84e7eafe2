//! Are the nodes there, are they Chroma servers, and are they not one and the same?

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;

use uuid::Uuid;

use super::{Finding, ask};
use crate::chroma::{OWN_TENANT, node_path, parse_collection_list};
use crate::config::Config;

const DEFAULT_TENANT: &str = "default_tenant";
const DEFAULT_DATABASE: &str = "default_database";

/// What tells one server from another.
#[derive(Debug, Default, PartialEq, Eq)]
struct Identity {
    addresses: BTreeSet<SocketAddr>,
    /// Of collections; random, so two servers have none in common unless one is a copy of the other.
    ids: BTreeSet<Uuid>,
}

/// A finding for each node.
pub async fn reach(config: &Config) -> Vec<(String, Finding)> {
    let mut findings = Vec::new();
    let mut seen: Vec<(String, Identity)> = Vec::new();
    for node in &config.nodes {
        let authority = node.url.authority();
        let mut finding = greet(&authority).await;
        if finding.is_ok() {
            let identity = identify(&authority).await;
            if let Some(reason) = same(&identity, &seen) {
                finding = Err(reason);
            }
            seen.push((node.name.clone(), identity));
        }
        findings.push((format!("node {} at {}", node.name, node.url), finding));
    }
    findings
}

async fn greet(authority: &str) -> Finding {
    let heartbeat = ask::get(authority, node_path::HEARTBEAT).await?;
    if heartbeat.status != 200 || !heartbeat.body.starts_with(b"{") {
        return Err(format!(
            "answers {} to a heartbeat: is it a Chroma server?",
            heartbeat.status
        ));
    }
    let own = ask::get(authority, "/status").await?;
    if own.status == 200 && String::from_utf8_lossy(&own.body).contains("Diptych") {
        return Err("is a Diptych, not a Chroma server".to_owned());
    }
    let read = ask::get(authority, &node_path::tenant(DEFAULT_TENANT)).await?;
    if read.status >= 500 {
        return Err(format!(
            "answers a heartbeat, but a read that goes to its disk with {}",
            read.status
        ));
    }
    let version = ask::get(authority, "/api/v2/version").await?;
    let version = String::from_utf8_lossy(&version.body);
    Ok(format!("Chroma says version {}", version.trim().trim_matches('"')))
}

async fn identify(authority: &str) -> Identity {
    let mut identity = Identity::default();
    if let Ok(addresses) = tokio::net::lookup_host(authority).await {
        identity.addresses.extend(addresses);
    }
    for (tenant, database) in [(OWN_TENANT, "health"), (DEFAULT_TENANT, DEFAULT_DATABASE)] {
        let path = format!("{}?limit=100", node_path::collections(tenant, database));
        if let Ok(answer) = ask::get(authority, &path).await {
            let found = parse_collection_list(&answer.body).unwrap_or_default();
            identity.ids.extend(found.iter().map(|collection| collection.id));
        }
    }
    identity
}

fn same(identity: &Identity, seen: &[(String, Identity)]) -> Option<String> {
    let mut reasons = HashMap::new();
    for (name, other) in seen {
        if let Some(address) = identity.addresses.intersection(&other.addresses).next() {
            reasons.insert(name, format!("is the same server as {name}: both are at {address}"));
        } else if let Some(id) = identity.ids.intersection(&other.ids).next() {
            let reason = format!(
                "has the collection {id} under the same id as {name}: it is the same server, or runs on a copy of its data"
            );
            reasons.insert(name, reason);
        }
    }
    seen.iter().find_map(|(name, _)| reasons.remove(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(port: u16, id: u128) -> Identity {
        Identity {
            addresses: BTreeSet::from([SocketAddr::from(([10, 0, 0, 1], port))]),
            ids: BTreeSet::from([Uuid::from_u128(id)]),
        }
    }

    #[test]
    fn one_server_under_two_names_is_found() {
        let seen = [("primary".to_owned(), identity(1, 1))];
        assert_eq!(same(&identity(2, 2), &seen), None);
        assert!(same(&identity(1, 2), &seen).unwrap().contains("both are at 10.0.0.1:1"));
        assert!(same(&identity(2, 1), &seen).unwrap().contains("same id as primary"));
        assert_eq!(
            same(&Identity::default(), &[("x".to_owned(), Identity::default())]),
            None
        );
    }
}
