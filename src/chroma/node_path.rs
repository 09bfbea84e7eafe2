//! Paths of our own requests to a node.
//!
//! What the proxy asks a node by itself (look-ups, markers, repair, drain) starts from decoded names; a tenant may hold
//! any character, also `/`. So every segment is encoded here, in one place, and nowhere else is a path put together.
//! Forwarded client paths are not built but kept raw, see [`super::routes::translate`].

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

/// Everything but RFC 3986's unreserved characters.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// GET: the cheapest sign of life.
pub const HEARTBEAT: &str = "/api/v2/heartbeat";
/// POST.
pub const TENANTS: &str = "/api/v2/tenants";
/// POST.
pub const RESET: &str = "/api/v2/reset";

/// GET, PATCH.
pub fn tenant(tenant: &str) -> String {
    let mut path = String::with_capacity(128);
    path.push_str(TENANTS);
    push(&mut path, tenant);
    path
}

/// GET lists, POST creates.
pub fn databases(tenant: &str) -> String {
    let mut path = self::tenant(tenant);
    path.push_str("/databases");
    path
}

/// GET, DELETE.
pub fn database(tenant: &str, database: &str) -> String {
    let mut path = databases(tenant);
    push(&mut path, database);
    path
}

/// GET lists, POST creates.
pub fn collections(tenant: &str, database: &str) -> String {
    let mut path = self::database(tenant, database);
    path.push_str("/collections");
    path
}

/// GET.
pub fn collections_count(tenant: &str, database: &str) -> String {
    let mut path = self::database(tenant, database);
    path.push_str("/collections_count");
    path
}

/// GET, DELETE: here the segment is a name, whatever it looks like.
pub fn by_name(tenant: &str, database: &str, name: &str) -> String {
    let mut path = collections(tenant, database);
    push(&mut path, name);
    path
}

/// GET.
pub fn by_id(tenant: &str, database: &str, id: Uuid) -> String {
    let mut path = collections(tenant, database);
    path.push_str("/by-id/");
    push_id(&mut path, id);
    path
}

/// PUT: here the segment is an id.
pub fn collection(tenant: &str, database: &str, id: Uuid) -> String {
    let mut path = collections(tenant, database);
    path.push('/');
    push_id(&mut path, id);
    path
}

/// `add`, `get`, `count`, ...: `op` is one of Chroma's own words, not encoded. Chroma ignores tenant and database here.
pub fn record(tenant: &str, database: &str, id: Uuid, op: &str) -> String {
    let mut path = collection(tenant, database, id);
    path.push('/');
    path.push_str(op);
    path
}

fn push(path: &mut String, segment: &str) {
    path.push('/');
    path.extend(utf8_percent_encode(segment, SEGMENT));
}

fn push_id(path: &mut String, id: Uuid) {
    path.push_str(id.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;
    use crate::chroma::routes::{RecordWrite, Route, Segment, classify};

    #[test]
    fn encodes_every_segment() {
        assert_eq!(tenant("tén/ü x%?#"), "/api/v2/tenants/t%C3%A9n%2F%C3%BC%20x%25%3F%23");
        assert_eq!(
            by_name("t", "d", "a.b_c-d+e"),
            "/api/v2/tenants/t/databases/d/collections/a.b_c-d%2Be"
        );
    }

    #[test]
    fn is_the_inverse_of_classify() {
        let (t, d, id) = ("a/b%2F ü", "x y", Uuid::from_u128(0xabc));
        let (tenant, database) = (t.to_owned(), d.to_owned());
        let Route::RecordWrite { target, write } = classify(&Method::POST, &record(t, d, id, "add")) else {
            panic!("not a record write");
        };
        assert_eq!(write, RecordWrite::Add);
        assert_eq!(
            (target.tenant.as_str(), target.database.as_str(), target.segment),
            (t, d, Segment::Id(id))
        );
        let name = "by/id".to_owned();
        assert_eq!(
            classify(&Method::DELETE, &by_name(t, d, &name)),
            Route::DeleteCollection {
                tenant: tenant.clone(),
                database: database.clone(),
                name
            }
        );
        assert!(
            matches!(classify(&Method::GET, &by_id(t, d, id)), Route::CollectionById { id: Some(i), .. } if i == id)
        );
        assert!(matches!(
            classify(&Method::PUT, &collection(t, d, id)),
            Route::ModifyCollection { .. }
        ));
        assert_eq!(
            classify(&Method::GET, &super::database(t, d)),
            Route::Database {
                tenant: tenant.clone(),
                database: database.clone()
            }
        );
        assert_eq!(
            classify(&Method::GET, &collections_count(t, d)),
            Route::CollectionCount { tenant, database }
        );
    }
}
