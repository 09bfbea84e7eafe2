//! The rules about records. Numbers are those of docs/invariants.md (I) and docs/schedules.md (S).

use crate::rules::rules;

rules! {
    /// Without any one of them an acknowledged write is lost, the nodes stay different, a stale value is served, or a
    /// node with everything on it cannot serve.
    RecordRule {
        /// The payload row is durable before the ack.
        RowBeforeAck = "row-before-ack", "I1";
        /// A node serves only once the commit that removed its rows is known to have happened.
        InSyncAfterCommit = "in-sync-after-commit", "I9, S10";
        /// Nothing is drained or repaired where a row's commit is uncertain.
        UncertainHolds = "uncertain-holds", "I11, S31";
        /// A row whose commit is uncertain is written again until it is known, and its node is out of sync meanwhile.
        UncertainIsRetried = "uncertain-is-retried", "I11, S9";
        /// What may still be on its way to a node has landed before anything else is sent there.
        StragglersAwaited = "stragglers-awaited", "I22, S11";
        /// A hidden write is made visible before a node is compared, copied from or trusted.
        FlushFirst = "flush-first", "I30, S15";
        /// The repair row of a restarted node is written between two writes only.
        RestartRowBetweenWrites = "restart-row-between-writes", "I29, S30";
        /// A repair reads its source between two writes only.
        RepairReadsBetweenWrites = "repair-reads-between-writes", "I29, S30";
        /// A refusal by one node leaves a payload row beside the repair row, until the refusal is equalised.
        PayloadBesideRepair = "payload-beside-repair", "I20, S6";
        /// Recovery writes the repair row of the node that is away when the first one serves.
        SourceFixedAtRecovery = "source-fixed-at-recovery", "I25, S14";
        /// Recovery makes equal what the intents above the low-water mark name.
        OpenIntentsReconciled = "open-intents-reconciled", "I24, S14";
        /// Payload rows of a wiped node wait for its repair.
        RowsWaitForRepair = "rows-wait-for-repair", "I34";
        /// The removal of one request's rows is committed before the next request of the drain.
        CursorPerRequest = "cursor-per-request", "I27, S32";
        /// The commit that removes a repair row removes the payload rows that it makes moot.
        RepairRemovesRows = "repair-removes-rows", "I33, S33";
        /// A repair row whose source is down is reversed.
        LostSourceReversed = "lost-source-reversed", "I35, S34";
        /// A node with an unchanged marker is drained before it is repaired.
        DrainBeforeRepair = "drain-before-repair", "I34, S34";
        /// A canary has to return from each node after every start.
        CanaryAtStart = "canary-at-start", "I23, S35";
        /// Also from a node that nothing in the journal speaks of.
        CanaryEvenIfClean = "canary-even-if-clean", "I23, S35";
        /// A repair row is not written if the source has one for those records itself.
        SourceIsSound = "source-is-sound", "I32, S36";
        /// The low-water mark does not pass a write whose rows are uncertain.
        LowWaterNeedsCover = "low-water-needs-cover", "I13";
        /// A restarted node is compared with its peer.
        RestartedIsCompared = "restarted-is-compared", "I37, S5";
        /// With no usable peer, a restarted node without rows serves.
        LastNodeServes = "last-node-serves", "I38, S37";
    }
}
