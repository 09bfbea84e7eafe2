//! What a request line means.
//!
//! A mirror may not guess: a write taken for a read reaches one node only, and the nodes are different from then on. So
//! this is Chroma's own router, written down again: literal segments match as raw bytes, a parameter matches any
//! segment, also an empty one unless it is the last (`/tenants//databases/d/collections/<uuid>/add` is a write!), is
//! percent-decoded once and then has to be UTF-8. What is left is told apart by method alone.
//!
//! Two rules of Chroma's that surprise: GET and DELETE of `/collections/{x}` take a name, PUT and everything below take
//! a UUID; and on the latter tenant and database are ignored. Where a UUID is expected and something else is given, it
//! is kept as a name, for the clients that address records so.

use std::ops::Range;

use http::Method;
use percent_encoding::percent_decode_str;
use uuid::Uuid;

/// Our tenant on every node: markers, checkpoints and canaries. Clients never reach it.
pub const OWN_TENANT: &str = "diptych_system";

const UUID_LENGTH: usize = 36;

const PREFIX: &str = "/api/v2";

/// The longest known path below the prefix has ten segments; beyond, nothing is known.
const MAX_SEGMENTS: usize = 12;

/// A path segment where Chroma wants a collection's UUID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Any spelling that Chroma takes: upper case, without dashes, in braces, as a URN.
    Id(Uuid),
    /// Anything else, percent-decoded.
    Name(String),
}

/// The collection that a record route addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Decoded; ignored by Chroma, counts where the segment is a name.
    pub tenant: String,
    /// Decoded; likewise.
    pub database: String,
    /// The collection.
    pub segment: Segment,
    /// Bytes of the collection's segment in the raw path, for [`translate`].
    pub span: Range<usize>,
}

/// A read of records of the most common form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainRead {
    pub label: &'static str,
    pub id: Uuid,
    /// Bytes of the UUID in the raw path.
    pub span: Range<usize>,
}

/// Kinds of reads of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordRead {
    Count,
    Get,
    Query,
    Search,
    /// Any other GET below a collection: `indexing_status`, `fork_count`, `functions/{name}`, and what later releases add.
    Other,
}

/// Kinds of writes of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordWrite {
    Add,
    Upsert,
    Update,
    Delete,
}

/// Meaning of a method and a path. Strings are percent-decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// No state behind it, any node can answer: heartbeat, version, documentation, ...
    Server,
    Tenant {
        tenant: String,
    },
    Database {
        tenant: String,
        database: String,
    },
    DatabaseList {
        tenant: String,
    },
    CollectionList {
        tenant: String,
        database: String,
    },
    CollectionCount {
        tenant: String,
        database: String,
    },
    CollectionByName {
        tenant: String,
        database: String,
        name: String,
    },
    /// `id` is absent if the segment is no UUID: Chroma answers 400.
    CollectionById {
        tenant: String,
        database: String,
        id: Option<Uuid>,
        span: Range<usize>,
    },
    RecordRead {
        target: Target,
        read: RecordRead,
    },
    RecordWrite {
        target: Target,
        write: RecordWrite,
    },
    CreateTenant,
    ModifyTenant {
        tenant: String,
    },
    CreateDatabase {
        tenant: String,
    },
    DeleteDatabase {
        tenant: String,
        database: String,
    },
    CreateCollection {
        tenant: String,
        database: String,
    },
    DeleteCollection {
        tenant: String,
        database: String,
        name: String,
    },
    ModifyCollection {
        target: Target,
    },
    Reset,
    /// A mutating method on a path below `/api/v2` that this release does not know, or knows to be unsupported by a
    /// single node (fork, attach, detach).
    OtherMutating {
        tenant: Option<String>,
        target: Option<Target>,
    },
    /// Any other method on an unknown path below `/api/v2`, or the wrong one on a known path.
    OtherRead {
        tenant: Option<String>,
    },
    /// `GET /api/v2/collections/{crn}`: a well-formed one panics a single node's handler.
    CrnLookup,
    /// Not below `/api/v2`.
    Outside {
        mutating: bool,
    },
}

impl Route {
    /// The tenant in the path, decoded as Chroma decodes it.
    pub fn tenant(&self) -> Option<&str> {
        match self {
            Route::Tenant { tenant }
            | Route::Database { tenant, .. }
            | Route::DatabaseList { tenant }
            | Route::CollectionList { tenant, .. }
            | Route::CollectionCount { tenant, .. }
            | Route::CollectionByName { tenant, .. }
            | Route::CollectionById { tenant, .. }
            | Route::ModifyTenant { tenant }
            | Route::CreateDatabase { tenant }
            | Route::DeleteDatabase { tenant, .. }
            | Route::CreateCollection { tenant, .. }
            | Route::DeleteCollection { tenant, .. } => Some(tenant),
            Route::RecordRead { target, .. }
            | Route::RecordWrite { target, .. }
            | Route::ModifyCollection { target } => Some(&target.tenant),
            Route::OtherMutating { tenant, .. } | Route::OtherRead { tenant } => tenant.as_deref(),
            Route::Server | Route::CreateTenant | Route::Reset | Route::CrnLookup | Route::Outside { .. } => None,
        }
    }

    /// The collection segment to translate, if Chroma takes the UUID of this route from it.
    pub fn target(&self) -> Option<&Target> {
        match self {
            Route::RecordRead { target, .. }
            | Route::RecordWrite { target, .. }
            | Route::ModifyCollection { target } => Some(target),
            Route::OtherMutating { target, .. } => target.as_ref(),
            _ => None,
        }
    }

    /// The closed label set of metrics and logs. Writes are called as in [`super::Op::label`].
    pub fn label(&self) -> &'static str {
        match self {
            Route::Server => "server",
            Route::Tenant { .. } => "get_tenant",
            Route::Database { .. } => "get_database",
            Route::DatabaseList { .. } => "list_databases",
            Route::CollectionList { .. } => "list_collections",
            Route::CollectionCount { .. } => "count_collections",
            Route::CollectionByName { .. } | Route::CollectionById { .. } => "get_collection",
            Route::RecordRead {
                read: RecordRead::Count,
                ..
            } => "count",
            Route::RecordRead {
                read: RecordRead::Get, ..
            } => "get",
            Route::RecordRead {
                read: RecordRead::Query,
                ..
            } => "query",
            Route::RecordRead {
                read: RecordRead::Search,
                ..
            } => "search",
            Route::RecordRead {
                read: RecordRead::Other,
                ..
            } => "other_read",
            Route::RecordWrite { write, .. } => write.label(),
            Route::CreateTenant => "create_tenant",
            Route::ModifyTenant { .. } => "modify_tenant",
            Route::CreateDatabase { .. } => "create_database",
            Route::DeleteDatabase { .. } => "delete_database",
            Route::CreateCollection { .. } => "create_collection",
            Route::DeleteCollection { .. } => "delete_collection",
            Route::ModifyCollection { .. } => "modify_collection",
            Route::Reset => "reset",
            Route::OtherMutating { .. } => "other",
            Route::OtherRead { .. } | Route::CrnLookup => "other_read",
            Route::Outside { .. } => "outside",
        }
    }
}

impl RecordWrite {
    /// Chroma's word for it: the last segment of the path, and the label.
    pub fn label(self) -> &'static str {
        match self {
            RecordWrite::Add => "add",
            RecordWrite::Upsert => "upsert",
            RecordWrite::Update => "update",
            RecordWrite::Delete => "delete",
        }
    }
}

/// Classifies a request by its method and its path: no query, raw as on the wire.
pub fn classify(method: &Method, raw_path: &str) -> Route {
    let method = Kind::of(method);
    let Some(rest) = raw_path
        .strip_prefix(PREFIX)
        .filter(|rest| rest.is_empty() || rest.starts_with('/'))
    else {
        return outside(method, raw_path);
    };
    if rest.is_empty() {
        return if method == Kind::Read {
            Route::Server
        } else {
            unknown(method, None, None)
        };
    }
    let mut segments = [""; MAX_SEGMENTS];
    let mut count = 0;
    let mut start = 1;
    let ends = memchr::memchr_iter(b'/', &rest.as_bytes()[1..]).map(|slash| 1 + slash);
    // Beyond, it is too long to be known; what is there still tells the tenant and the collection.
    for end in ends.chain([rest.len()]).take(MAX_SEGMENTS) {
        segments[count] = &rest[start..end];
        count += 1;
        start = end + 1;
    }
    let path = Path {
        raw: raw_path,
        segments: &segments[..count],
    };
    match path.segments {
        ["tenants", tenant, rest @ ..] => path.below_tenant(method, tenant, rest),
        ["heartbeat" | "healthcheck" | "version" | "pre-flight-checks"] | ["auth", "identity"]
            if method == Kind::Read =>
        {
            Route::Server
        }
        ["collections", crn] if method == Kind::Read && !crn.is_empty() => Route::CrnLookup,
        ["tenants"] if method == Kind::Post => Route::CreateTenant,
        ["reset"] if method == Kind::Post => Route::Reset,
        _ => unknown(method, None, None),
    }
}

/// `get` or `query` of a collection by its UUID, hyphenated: what by far the most requests are, told without copying
/// anything of the path. `None`: whatever it is, [`classify`] knows.
pub fn plain_read(method: &Method, raw_path: &str) -> Option<PlainRead> {
    fn segment(path: &str) -> Option<(&str, &str)> {
        // Segments are short: this is quicker than a search that is made for long texts.
        let end = path.bytes().position(|byte| byte == b'/')?;
        Some((&path[..end], &path[end + 1..]))
    }
    if *method != Method::POST {
        return None;
    }
    let rest = raw_path.strip_prefix(PREFIX)?.strip_prefix("/tenants/")?;
    let (tenant, rest) = segment(rest)?;
    let (database, rest) = segment(rest.strip_prefix("databases/")?)?;
    let (id, operation) = segment(rest.strip_prefix("collections/")?)?;
    let label = match operation {
        "get" => "get",
        "query" => "query",
        _ => return None,
    };
    let is_plain = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte != b'%');
    if !is_plain(tenant) || !is_plain(database) || tenant == OWN_TENANT || id.len() != UUID_LENGTH {
        return None;
    }
    let end = raw_path.len() - operation.len() - 1;
    Some(PlainRead {
        label,
        id: Uuid::try_parse(id).ok()?,
        span: end - UUID_LENGTH..end,
    })
}

/// `raw_path` with the collection's segment at `span` replaced by `id`; everything else stays as the client sent it.
pub fn translate(raw_path: &str, span: Range<usize>, id: Uuid) -> String {
    let mut path = String::with_capacity(raw_path.len() - span.len() + 36);
    path.push_str(&raw_path[..span.start]);
    path.push_str(id.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
    path.push_str(&raw_path[span.end..]);
    path
}

/// Methods as the router tells them apart. HEAD is answered by the route of GET; OPTIONS, TRACE and words nobody knows
/// change nothing (405).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Post,
    Put,
    Patch,
    Delete,
    Inert,
}

impl Kind {
    fn of(method: &Method) -> Kind {
        match *method {
            Method::GET | Method::HEAD => Kind::Read,
            Method::POST => Kind::Post,
            Method::PUT => Kind::Put,
            Method::PATCH => Kind::Patch,
            Method::DELETE => Kind::Delete,
            _ => Kind::Inert,
        }
    }

    fn is_mutating(self) -> bool {
        !matches!(self, Kind::Read | Kind::Inert)
    }
}

fn outside(method: Kind, raw_path: &str) -> Route {
    let is_docs = raw_path == "/openapi.json" || raw_path == "/docs" || raw_path.starts_with("/docs/");
    if is_docs && method == Kind::Read {
        Route::Server
    } else {
        Route::Outside {
            mutating: method.is_mutating(),
        }
    }
}

fn unknown(method: Kind, tenant: Option<String>, target: Option<Target>) -> Route {
    if method.is_mutating() {
        Route::OtherMutating { tenant, target }
    } else {
        Route::OtherRead { tenant }
    }
}

struct Path<'a> {
    raw: &'a str,
    segments: &'a [&'a str],
}

impl Path<'_> {
    fn below_tenant(&self, method: Kind, tenant: &str, rest: &[&str]) -> Route {
        let Some(tenant) = decode(tenant) else {
            return unknown(method, None, None);
        };
        match (method, rest) {
            (Kind::Read, []) if !tenant.is_empty() => Route::Tenant { tenant },
            (Kind::Patch, []) if !tenant.is_empty() => Route::ModifyTenant { tenant },
            (Kind::Read, ["databases"]) => Route::DatabaseList { tenant },
            (Kind::Post, ["databases"]) => Route::CreateDatabase { tenant },
            (_, ["databases", database, rest @ ..]) => self.below_database(method, tenant, database, rest),
            _ => unknown(method, Some(tenant), None),
        }
    }

    fn below_database(&self, method: Kind, tenant: String, database: &str, rest: &[&str]) -> Route {
        let Some(database) = decode(database) else {
            return unknown(method, Some(tenant), None);
        };
        match (method, rest) {
            (Kind::Read, []) if !database.is_empty() => Route::Database { tenant, database },
            (Kind::Delete, []) if !database.is_empty() => Route::DeleteDatabase { tenant, database },
            (Kind::Read, ["collections"]) => Route::CollectionList { tenant, database },
            (Kind::Post, ["collections"]) => Route::CreateCollection { tenant, database },
            (Kind::Read, ["collections_count"]) => Route::CollectionCount { tenant, database },
            (_, ["collections", "by-id", id]) => self.by_id(method, tenant, database, id),
            (_, ["collections", collection, rest @ ..]) => {
                self.below_collection(method, tenant, database, collection, rest)
            }
            _ => unknown(method, Some(tenant), None),
        }
    }

    fn by_id(&self, method: Kind, tenant: String, database: String, segment: &str) -> Route {
        let span = self.span(segment);
        let id = decode(segment).and_then(|text| Uuid::parse_str(&text).ok());
        match (method, id) {
            (Kind::Read, id) if !segment.is_empty() => Route::CollectionById {
                tenant,
                database,
                id,
                span,
            },
            // Not a name: with `by-id` translated, `POST by-id/add` would become another collection's `add`.
            (_, Some(id)) => {
                let target = Target {
                    tenant: tenant.clone(),
                    database,
                    segment: Segment::Id(id),
                    span,
                };
                unknown(method, Some(tenant), Some(target))
            }
            _ => unknown(method, Some(tenant), None),
        }
    }

    fn below_collection(&self, method: Kind, tenant: String, database: String, raw: &str, rest: &[&str]) -> Route {
        let Some(name) = decode(raw) else {
            return unknown(method, Some(tenant), None);
        };
        match (method, rest) {
            (_, []) if raw.is_empty() => return unknown(method, Some(tenant), None),
            (Kind::Read, []) => return Route::CollectionByName { tenant, database, name },
            (Kind::Delete, []) => return Route::DeleteCollection { tenant, database, name },
            _ => {}
        }
        let segment = Uuid::parse_str(&name).map_or_else(|_| Segment::Name(name), Segment::Id);
        let target = Target {
            tenant,
            database,
            segment,
            span: self.span(raw),
        };
        match (method, rest) {
            (Kind::Put, []) => Route::ModifyCollection { target },
            (Kind::Read, ["count"]) => Route::RecordRead {
                target,
                read: RecordRead::Count,
            },
            (Kind::Post, ["get"]) => Route::RecordRead {
                target,
                read: RecordRead::Get,
            },
            (Kind::Post, ["query"]) => Route::RecordRead {
                target,
                read: RecordRead::Query,
            },
            (Kind::Post, ["search"]) => Route::RecordRead {
                target,
                read: RecordRead::Search,
            },
            (Kind::Post, ["add"]) => Route::RecordWrite {
                target,
                write: RecordWrite::Add,
            },
            (Kind::Post, ["upsert"]) => Route::RecordWrite {
                target,
                write: RecordWrite::Upsert,
            },
            (Kind::Post, ["update"]) => Route::RecordWrite {
                target,
                write: RecordWrite::Update,
            },
            (Kind::Post, ["delete"]) => Route::RecordWrite {
                target,
                write: RecordWrite::Delete,
            },
            (Kind::Read, rest) if rest.iter().all(|segment| !segment.is_empty()) => Route::RecordRead {
                target,
                read: RecordRead::Other,
            },
            _ => unknown(method, Some(target.tenant.clone()), Some(target)),
        }
    }

    /// Where `segment`, a part of `raw`, begins and ends in it.
    fn span(&self, segment: &str) -> Range<usize> {
        let start = segment.as_ptr() as usize - self.raw.as_ptr() as usize;
        start..start + segment.len()
    }
}

/// Percent-decoded once; `None` if that is not UTF-8: Chroma answers 400 to it.
fn decode(segment: &str) -> Option<String> {
    if memchr::memchr(b'%', segment.as_bytes()).is_none() {
        return Some(segment.to_owned());
    }
    percent_decode_str(segment)
        .decode_utf8()
        .ok()
        .map(|text| text.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "45bc6510-e6f3-4641-9b2a-e56088985426";

    /// `B` stands for tenant `t1`, database `db1`; `ID` for a UUID.
    fn route(line: &str) -> Route {
        let (method, path) = line.split_once(' ').unwrap();
        let path = path.replacen(
            'B',
            "/api/v2/tenants/t1/databases/db1",
            usize::from(path.starts_with('B')),
        );
        let path = path.replace("ID", ID);
        let route = classify(&method.parse().unwrap(), &path);
        if let Some(read) = plain_read(&method.parse().unwrap(), &path) {
            let target = route.target().expect("a collection's route");
            assert!(matches!(route, Route::RecordRead { .. }), "{line}");
            assert_eq!(read.label, route.label(), "{line}");
            assert_eq!(
                (Segment::Id(read.id), read.span),
                (target.segment.clone(), target.span.clone()),
                "{line}"
            );
        }
        if let Some(target) = route.target() {
            let translated = translate(&path, target.span.clone(), Uuid::nil());
            let again = classify(&method.parse().unwrap(), &translated);
            assert_eq!(again.label(), route.label(), "{line}: translation changed the meaning");
            assert_eq!(
                again.target().map(|t| t.segment.clone()),
                Some(Segment::Id(Uuid::nil())),
                "{line}"
            );
        }
        route
    }

    #[test]
    fn the_most_common_reads_are_told_without_copies() {
        let plain = |line: &str| {
            let (method, path) = line.split_once(' ').unwrap();
            let path = path.replace("ID", ID);
            plain_read(&method.parse().unwrap(), &path).map(|read| (read.label, path[read.span].to_owned()))
        };
        for label in ["get", "query"] {
            let line = format!("POST /api/v2/tenants/t1/databases/db1/collections/ID/{label}");
            assert_eq!(plain(&line), Some((label, ID.to_owned())));
        }
        for other in [
            "GET /api/v2/tenants/t1/databases/db1/collections/ID/get",
            "POST /api/v2/tenants/t1/databases/db1/collections/ID/add",
            "POST /api/v2/tenants/t1/databases/db1/collections/ID/get/",
            "POST /api/v2/tenants/t1/databases/db1/collections/a-name/get",
            "POST /api/v2/tenants/diptych_system/databases/db1/collections/ID/get",
            "POST /api/v2/tenants/diptych%5fsystem/databases/db1/collections/ID/get",
            "POST /api/v2/tenants//databases/db1/collections/ID/get",
            "POST /api/v2/tenants/t1/databases/d%zz/collections/ID/get",
            "POST /api/v1/tenants/t1/databases/db1/collections/ID/get",
        ] {
            assert_eq!(plain(other), None, "{other}");
        }
    }

    /// One short word per class, so that the table below reads like chroma-facts.md.
    fn class(line: &str) -> String {
        let segment = |target: &Target| match &target.segment {
            Segment::Id(_) => "id".to_owned(),
            Segment::Name(name) => format!("name {name}"),
        };
        match route(line) {
            Route::RecordRead { target, read } => format!("read {read:?} {}", segment(&target)),
            Route::RecordWrite { target, write } => format!("write {write:?} {}", segment(&target)),
            Route::ModifyCollection { target } => format!("modify {}", segment(&target)),
            Route::CollectionByName { name, .. } => format!("by-name {name}"),
            Route::DeleteCollection { name, .. } => format!("delete {name}"),
            Route::CollectionById { id, .. } => format!("by-id {}", if id.is_some() { "id" } else { "-" }),
            Route::OtherMutating {
                target: Some(target), ..
            } => format!("mutating {}", segment(&target)),
            Route::OtherMutating { target: None, .. } => "mutating".to_owned(),
            Route::OtherRead { .. } => "other".to_owned(),
            Route::Outside { mutating } => format!("outside {mutating}"),
            route => route.label().to_owned(),
        }
    }

    #[test]
    fn every_route_of_chroma_has_its_class() {
        let table = [
            // chroma-facts.md 1.1
            ("GET /api/v2", "server"),
            ("GET /api/v2/heartbeat", "server"),
            ("HEAD /api/v2/heartbeat", "server"),
            ("GET /api/v2/healthcheck", "server"),
            ("GET /api/v2/version", "server"),
            ("GET /api/v2/pre-flight-checks", "server"),
            ("GET /api/v2/auth/identity", "server"),
            ("GET /api/v2/tenants/t1", "get_tenant"),
            ("GET /api/v2/tenants/t1/databases", "list_databases"),
            ("GET B", "get_database"),
            ("GET B/collections", "list_collections"),
            ("GET B/collections_count", "count_collections"),
            ("GET B/collections/col1", "by-name col1"),
            ("GET B/collections/ID", "by-name 45bc6510-e6f3-4641-9b2a-e56088985426"),
            ("GET B/collections/by-id/ID", "by-id id"),
            ("GET B/collections/by-id/col1", "by-id -"),
            ("GET B/collections/ID/count", "read Count id"),
            ("HEAD B/collections/ID/count", "read Count id"),
            ("POST B/collections/ID/get", "read Get id"),
            ("POST B/collections/ID/query", "read Query id"),
            ("POST B/collections/ID/search", "read Search id"),
            ("GET B/collections/ID/indexing_status", "read Other id"),
            ("GET B/collections/ID/fork_count", "read Other id"),
            ("GET B/collections/ID/functions/f", "read Other id"),
            ("GET /api/v2/collections/a:b:c", "other_read"),
            ("GET /openapi.json", "server"),
            ("GET /docs", "server"),
            ("GET /docs/", "server"),
            ("GET /docs/swagger-ui.css", "server"),
            // 1.2
            ("POST /api/v2/reset", "reset"),
            ("POST /api/v2/tenants", "create_tenant"),
            ("PATCH /api/v2/tenants/t1", "modify_tenant"),
            ("POST /api/v2/tenants/t1/databases", "create_database"),
            ("DELETE B", "delete_database"),
            ("POST B/collections", "create_collection"),
            ("PUT B/collections/ID", "modify id"),
            ("DELETE B/collections/col1", "delete col1"),
            ("POST B/collections/ID/add", "write Add id"),
            ("POST B/collections/ID/upsert", "write Upsert id"),
            ("POST B/collections/ID/update", "write Update id"),
            ("POST B/collections/ID/delete", "write Delete id"),
            ("POST B/collections/ID/fork", "mutating id"),
            ("POST B/collections/ID/functions/attach", "mutating id"),
            ("POST B/collections/ID/attached_functions/f/detach", "mutating id"),
            // 2: spellings of a segment
            ("POST B/collections/col1/add", "write Add name col1"),
            ("PUT B/collections/col1", "modify name col1"),
            (
                "POST B/collections/45BC6510E6F346419B2AE56088985426/add",
                "write Add id",
            ),
            ("POST B/collections/%7BID%7D/add", "write Add id"),
            ("POST B/collections/urn:uuid:ID/add", "write Add id"),
            (
                "POST B/collections/%20ID/add",
                "write Add name  45bc6510-e6f3-4641-9b2a-e56088985426",
            ),
            ("POST B/collections/a%2Fb/add", "write Add name a/b"),
            ("POST B/collections/a%252Fb/add", "write Add name a%2Fb"),
            ("GET B/collections/c%6Fl1", "by-name col1"),
            ("DELETE B/collections/ID", "delete 45bc6510-e6f3-4641-9b2a-e56088985426"),
            ("GET B/collections/by-id", "by-name by-id"),
            ("DELETE B/collections/by-id", "delete by-id"),
            ("PUT B/collections/by-id", "modify name by-id"),
            // An empty parameter matches unless it is the last segment.
            ("POST /api/v2/tenants//databases/db1/collections/ID/add", "write Add id"),
            ("POST B/collections//add", "write Add name "),
            ("GET /api/v2/tenants//databases", "list_databases"),
            ("GET /api/v2/tenants/t1/databases//collections", "list_collections"),
            ("GET /api/v2/tenants/", "other"),
            ("PATCH /api/v2/tenants/", "mutating"),
            ("DELETE /api/v2/tenants/t1/databases/", "mutating"),
            ("GET B/collections/", "other"),
            ("DELETE B/collections/", "mutating"),
            ("GET B/collections/by-id/", "other"),
            ("GET /api/v2/collections/", "other"),
            // Known to nobody.
            ("GET /api/v2/", "other"),
            ("GET /api/v2/heartbeat/", "other"),
            ("POST /api/v2/heartbeat", "mutating"),
            ("GET /api/v2/%68eartbeat", "other"),
            ("GET /api/v2/Heartbeat", "other"),
            ("GET /api/v2/reset", "other"),
            ("GET /api/v2/tenants", "other"),
            ("POST /api/v2//reset", "mutating"),
            ("GET B/", "other"),
            ("GET B/collections/ID/count/", "other"),
            ("GET B/collections/ID/later", "read Other id"),
            ("POST B/collections/ID/add/", "mutating id"),
            ("POST B/collections/ID//add", "mutating id"),
            ("POST B/collections/ID/ADD", "mutating id"),
            ("POST B/collections/ID/later/and/later", "mutating id"),
            ("POST B/collections/ID/a/b/c/d/e/f/g/h/i/j/k", "mutating id"),
            ("PUT B/collections/ID/add", "mutating id"),
            ("PATCH B/collections/ID", "mutating id"),
            ("POST B/collections/by-id/add", "mutating"),
            ("DELETE B/collections/by-id/ID", "mutating id"),
            ("PUT B", "mutating"),
            ("POST B/later", "mutating"),
            ("OPTIONS B/collections/ID/add", "other"),
            ("TRACE B/collections/ID/add", "other"),
            ("FOO /api/v2/reset", "other"),
            ("POST /api/v2/tenants/%ff/databases/db1/collections/ID/add", "mutating"),
            ("GET /api/v2/tenants/%ff", "other"),
            ("POST B/collections/%ff/add", "mutating"),
            // Elsewhere.
            ("GET /", "outside false"),
            ("GET /api/v1/heartbeat", "outside false"),
            ("POST /api/v1/collections", "outside true"),
            ("GET /api/v2x", "outside false"),
            ("GET //api/v2/heartbeat", "outside false"),
            ("GET /%61pi/v2/heartbeat", "outside false"),
            ("POST /api/V2/reset", "outside true"),
            ("POST /docs", "outside true"),
            ("GET /docsx", "outside false"),
            ("DELETE ", "outside true"),
        ];
        for (line, expected) in table {
            assert_eq!(class(line), expected, "{line}");
        }
    }

    #[test]
    fn our_own_tenant_is_seen_however_it_is_spelled() {
        for tenant in [
            "diptych_system",
            "%64iptych_system",
            "diptych%5Fsystem",
            "%64%69%70%74%79%63%68%5f%73ystem",
        ] {
            for line in [
                "GET /api/v2/tenants/T",
                "PATCH /api/v2/tenants/T",
                "GET /api/v2/tenants/T/databases",
                "DELETE /api/v2/tenants/T/databases/x",
                "POST /api/v2/tenants/T/databases/x/collections",
                "GET /api/v2/tenants/T/databases/x/collections/y",
                "GET /api/v2/tenants/T/databases/x/collections/by-id/ID",
                "POST /api/v2/tenants/T/databases/x/collections/by-id/ID",
                "POST /api/v2/tenants/T/databases/x/collections/ID/upsert",
                "POST /api/v2/tenants/T/databases/x/collections/ID/fork",
                "POST /api/v2/tenants/T/databases/%ff/collections/ID/add",
                "PUT /api/v2/tenants/T/databases/x/collections/ID",
                "GET /api/v2/tenants/T/later",
                "POST /api/v2/tenants/T/later",
                "OPTIONS /api/v2/tenants/T/databases",
            ] {
                let line = line.replace("/T", &format!("/{tenant}"));
                assert_eq!(route(&line).tenant(), Some(OWN_TENANT), "{line}");
            }
        }
        assert_ne!(
            route("GET /api/v2/tenants/%2564iptych_system").tenant(),
            Some(OWN_TENANT)
        ); // decoded once only
    }

    #[test]
    fn names_are_decoded_and_spans_are_raw() {
        let path = "/api/v2/tenants/t%C3%A9n%2F%C3%BC%20x/databases/d%31/collections/c%6Fl/add";
        let Route::RecordWrite { target, .. } = classify(&Method::POST, path) else {
            panic!("not a write")
        };
        assert_eq!((target.tenant.as_str(), target.database.as_str()), ("tén/ü x", "d1"));
        assert_eq!(&path[target.span.clone()], "c%6Fl");
        assert_eq!(
            translate(path, target.span, Uuid::nil()),
            "/api/v2/tenants/t%C3%A9n%2F%C3%BC%20x/databases/d%31/collections/00000000-0000-0000-0000-000000000000/add"
        );
        let Route::CollectionById { span, .. } = route("GET B/collections/by-id/ID") else {
            panic!("not by-id")
        };
        assert_eq!(span.len(), ID.len());
    }
}
