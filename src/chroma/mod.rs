//! Chroma's HTTP interface, as far as a mirror has to understand it.
//!
//! Everything here is pure: paths and bytes in, decisions and bytes out. What a route means is in [`routes`], what a
//! request body may do to a node in [`bodies`], which UUID stands for which in [`ids`], and what a node's answer says
//! about its state in [`answers`].

pub mod answers;
pub mod bodies;
pub mod ids;
pub mod node_path;
mod op;
pub mod page;
pub mod routes;

pub use answers::{Verdict, verdict};
pub use bodies::{
    BatchLimits, CreateBody, DeleteBody, MOST_RECORDS, ModifyBody, ParseProblem, Piece, RecordBody, Refusal, Shape,
    parse_create, parse_delete, parse_modify, parse_name, parse_record, splice,
};
pub use ids::{
    CollectionObject, canonical_refusal, deleted_body, parse_collection_list, parse_collection_object,
    parse_ids_answer, parse_names, render_list, replace_uuid, translate_list, translate_object,
};
pub use op::{Generation, Op};
pub use page::Page;
pub use routes::{OWN_TENANT, RecordRead, RecordWrite, Route, Segment, Target, classify, plain_read, translate};
