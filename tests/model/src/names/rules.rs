//! The rules about names. Numbers are those of docs/invariants.md (I) and docs/schedules.md (S).

use crate::rules::rules;

rules! {
    NameRule {
        /// The completion of an operation is durable before its ack.
        CompletedDurably = "completed-durably", "I15, S1";
        /// Recovery looks at what each node has; it does not replay.
        InspectedNotReplayed = "inspected-not-replayed", "I15, S1";
        /// A delete is sent only where the name still stands for the UUID that is meant.
        DeletedById = "deleted-by-id", "I14, S12";
        /// 409 means "already" only for a UUID that belongs to nobody or to this generation.
        AlreadyOnlyIfOurs = "already-only-if-ours", "I14, S12";
        /// What may still be on its way to a node has landed before anything else is sent there.
        NameStragglersAwaited = "name-stragglers-awaited", "I22, S11";
        /// The ack waits for the catalog: rows and UUIDs.
        CatalogBeforeAck = "catalog-before-ack", "I15, S24";
        /// A repair row for the namespace is never reversed.
        NamespaceRowStays = "namespace-row-stays", "I35";
    }
}
