//! Admission: is this node the one it should be, and what may it lack? (design.md 9)
//!
//! Asked whenever a node has to be verified: at the first meeting since our start, and after every moment at which its
//! process may have become another one. What the node says of itself, marker and checkpoint, is compared with what the
//! journal remembers. What it may lack is written down in repair rows *before* the node is up: it serves nothing, and
//! not one entry is drained into it, before these are carried out.
//!
//! | the node says | it is | what follows |
//! |---|---|---|
//! | nothing is remembered of it | met for the first time | remembered |
//! | the marker of another node | another node | refused |
//! | another marker than it had, or none | wiped or swapped | everything is copied to it |
//! | a checkpoint beyond the journal's mark | as it was; the journal was restored | everything is verified |
//! | an older checkpoint than it had | restored from a backup | everything is copied to it, or it waits for an operator |
//! | what it said before | as it was | what was written since its checkpoint is compared (schedule S5) |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use super::cover::RepairWanted;
use super::{Core, Scope};
use crate::catalog::Collection;
use crate::chroma::{Generation, Op};
use crate::cluster::{Admission, Identity, NodeIndex, read_identity};
use crate::env::within;
use crate::fault;
use crate::journal::{Change, Commit, Lsn, NodeRecord, RepairKind};
use crate::lane::Exclusive;
use crate::repair::MOST_IN_LANE;

/// How long a node may take to say who it is.
const IDENTITY_LIMIT: Duration = Duration::from_secs(5);
/// How long an admission waits for the turn in one lane; it is tried again.
const LANE_LIMIT: Duration = Duration::from_secs(60);
/// Intents that are read at once.
const PAGE: usize = 1000;
/// More records than these of one collection are not listed: all of it is made equal, and that is never turned around. So
/// it is what is made equal record by record, with room for other rows.
const MOST_IDS: usize = MOST_IN_LANE / 2;
/// Rows that nobody waits for are looked through up to here.
const MOST_ROWS: usize = 100_000;

/// Reasons of rows that say that a node lost what it had: what it holds does not count.
pub(crate) const WIPED: &str = "the node was wiped or swapped";
pub(crate) const RESTORED: &str = "the node was restored from a backup";
const RESTARTED: &str = "the node was away: what was written since its checkpoint is compared";

/// What a node turns out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// Met for the first time.
    First,
    /// It has what it had, up to this checkpoint at least.
    Returned { checkpoint: Lsn },
    /// The same node, but older than it was.
    Restored { checkpoint: Lsn, remembered: Lsn },
    /// Wiped or swapped.
    Changed,
    /// It has seen what the journal does not know: the journal is older than it was.
    JournalRestored { seen: Lsn },
    /// It carries the marker of another node.
    Another(String),
}

/// `others`: name and marker of the other nodes; `mark`: the journal's durable low-water mark, which no checkpoint is
/// ever beyond while the journal is the one that it was written under.
fn judge(remembered: Option<(&str, Lsn)>, read: &Identity, others: &[(String, String)], mark: Lsn) -> Verdict {
    if let Some(marker) = &read.marker
        && let Some((name, _)) = others.iter().find(|(_, other)| other == marker)
    {
        return Verdict::Another(name.clone());
    }
    let checkpoint = read.checkpoint.unwrap_or(0);
    match remembered {
        Some((marker, _)) if read.marker.as_deref() != Some(marker) => Verdict::Changed,
        _ if checkpoint > mark => Verdict::JournalRestored { seen: checkpoint },
        None => Verdict::First,
        Some((_, remembered)) if checkpoint < remembered => Verdict::Restored { checkpoint, remembered },
        Some(_) => Verdict::Returned { checkpoint },
    }
}

/// Records of a collection that a node may have lost.
#[derive(Debug, Default)]
struct Touched {
    entries: Vec<(Lsn, Vec<String>)>,
    records: usize,
    /// From here on they were not listed: too many, or nobody knows which.
    all_from: Option<Lsn>,
}

impl Touched {
    fn add(&mut self, lsn: Lsn, ids: Option<Vec<String>>) {
        if self.all_from.is_some() {
            return;
        }
        match ids {
            Some(ids) if self.records + ids.len() <= MOST_IDS => {
                self.records += ids.len();
                self.entries.push((lsn, ids));
            }
            _ => self.all_from = Some(lsn),
        }
    }

    /// Of the entries before `bound`; `None`: all records.
    fn ids_before(self, bound: Lsn) -> Option<BTreeSet<String>> {
        if self.all_from.is_some_and(|from| from < bound) {
            return None;
        }
        let before = self.entries.into_iter().filter(|(lsn, _)| *lsn < bound);
        Some(before.flat_map(|(_, ids)| ids).collect())
    }
}

/// What was written since a checkpoint.
#[derive(Debug, Default)]
struct Since {
    collections: BTreeMap<Generation, Touched>,
    /// The first entry of the namespace.
    names: Option<Lsn>,
}

/// The cluster's way to the core.
pub(super) struct Gate(pub Weak<Core>);

#[async_trait]
impl Admission for Gate {
    async fn admit(&self, node: NodeIndex) -> Result<(), String> {
        match self.0.upgrade() {
            Some(core) => core.admit(node).await,
            None => Err("shutting down".to_owned()),
        }
    }
}

impl Core {
    /// Decides whether a node may go up, and writes down first what it may lack. The cluster holds a connection to it.
    ///
    /// # Errors
    /// Why not; it is tried again.
    pub async fn admit(self: &Arc<Self>, node: NodeIndex) -> Result<(), String> {
        let _one_at_a_time = self.admitting.lock().await;
        if self.cluster.node(node).is_in_maintenance() {
            return Err("it is in maintenance".to_owned());
        }
        let read = self.read_identity(node).await?;
        let verdict = self.verdict(node, &read);
        let name = &self.cluster.node(node).name;
        match &verdict {
            Verdict::First | Verdict::Returned { .. } => tracing::info!(node = name, ?verdict, "A node comes in."),
            _ => tracing::error!(node = name, ?verdict, ?read, "A node is not what it was."),
        }
        match verdict {
            Verdict::First => self.admit_first(node).await,
            Verdict::Returned { checkpoint } => self.admit_returned(node, checkpoint).await,
            Verdict::Restored { checkpoint, remembered } => self.admit_restored(node, checkpoint, remembered).await,
            Verdict::Changed => self.admit_changed(node).await,
            Verdict::JournalRestored { seen } => self.admit_beyond(node, seen).await,
            Verdict::Another(other) => Err(format!(
                "it carries the marker of the node {other}: two URLs lead to one server, two nodes were swapped, or one \
                 is a copy of the other's folder"
            )),
        }
    }

    async fn read_identity(&self, node: NodeIndex) -> Result<Identity, String> {
        within(&self.env, IDENTITY_LIMIT, self.cluster.node(node).read_identity())
            .await
            .unwrap_or_else(|| Err("it did not say in time who it is".to_owned()))
    }

    fn verdict(&self, node: NodeIndex, read: &Identity) -> Verdict {
        let member = self.cluster.node(node);
        let marker = member.marker();
        let remembered = marker
            .as_deref()
            .map(|marker| (marker, member.checkpoint().unwrap_or(0)));
        let others = self.cluster.nodes().iter().filter(|other| other.index != node);
        let others: Vec<_> = others
            .filter_map(|other| Some((other.name.clone(), other.marker()?)))
            .collect();
        judge(remembered, read, &others, self.log.stored_low_water())
    }

    /// Whether the process that is held is the node that was admitted. If not, the node is down at once.
    pub async fn marker_is_unchanged(&self, node: NodeIndex) -> bool {
        let member = self.cluster.node(node);
        let read = within(&self.env, IDENTITY_LIMIT, member.read_marker()).await;
        let same = matches!(&read, Some(Ok(Some(read))) if Some(read) == member.marker().as_ref());
        // One that is slow is not another one: the connection that is held still speaks for it.
        if !same && !matches!(read, None | Some(Err(_))) {
            self.cluster
                .report_unverified(node, "it could not show the marker that it was known by");
        }
        same
    }

    /// Everything at or below the durable mark is on the node or covered by a row: has the node say so, and remembers
    /// it, so that only what comes after is compared when it returns.
    async fn remember(self: &Arc<Self>, node: NodeIndex, mut changes: Commit) -> Result<(), String> {
        let _one_at_a_time = self.remembering.lock().await;
        let member = self.cluster.node(node);
        let mark = self.log.stored_low_water();
        let written = async {
            let marker = member.write_marker().await?;
            member.write_checkpoint(mark).await?;
            Ok(marker)
        };
        let marker = within(&self.env, IDENTITY_LIMIT, written)
            .await
            .unwrap_or_else(|| Err("its marker was not written in time".to_owned()))?;
        changes.insert(
            0,
            Change::PutNode(NodeRecord {
                node: member.name.clone(),
                marker,
                checkpoint: mark,
            }),
        );
        fault::point("marker-written");
        // Tried again as a whole if it fails; writing it twice is writing it once.
        self.log.commit(&changes).await.map_err(not_kept)?;
        self.apply(&changes);
        Ok(())
    }

    async fn admit_first(self: &Arc<Self>, node: NodeIndex) -> Result<(), String> {
        let _names = self.turn(&Scope::Namespace).await?;
        let coming = self.creations_for(node).await?;
        let unknown: Vec<_> = self
            .living_collections()
            .into_iter()
            .filter(|collection| collection.node_id(node).is_none() && collection.pairs[node].repairs() == 0)
            .filter(|collection| !coming.contains(&collection.generation))
            .collect();
        for collection in &unknown {
            let scope = Scope::Collection(collection.clone());
            let _alone = self.turn(&scope).await?;
            let wanted = RepairWanted::whole(self.log.next_lsn(), "the node is new");
            self.replace_rows(&scope, node, wanted, vec![]).await?;
        }
        if !unknown.is_empty() {
            self.copy_names(node, "the node is new").await?;
        }
        self.remember(node, vec![]).await
    }

    /// Collections that the drain is going to create on a node.
    async fn creations_for(&self, node: NodeIndex) -> Result<BTreeSet<Generation>, String> {
        if self.namespace.pairs[node].pending() == 0 {
            return Ok(BTreeSet::new());
        }
        let name = &self.cluster.node(node).name;
        let rows = self.log.journal().payloads(name, None, MOST_ROWS, usize::MAX).await;
        let creations = rows.map_err(not_read)?.into_iter().filter_map(|row| match row.op {
            Op::CreateCollection { generation, .. } => Some(generation),
            _ => None,
        });
        Ok(creations.collect())
    }

    async fn admit_returned(self: &Arc<Self>, node: NodeIndex, checkpoint: Lsn) -> Result<(), String> {
        let since = match self.since(checkpoint).await {
            Ok(since) => since,
            // Nobody could be its source, now or while this lasts: no other node is up (schedule S37).
            Err(_) if self.peers(node).next().is_none() => return Ok(()),
            Err(reason) => return Err(reason),
        };
        for (generation, touched) in since.collections {
            let living = self.catalog.by_generation(generation).filter(|one| !one.is_deleted());
            if let Some(collection) = living {
                self.compare_collection(node, &collection, touched).await?;
            }
        }
        let Some(first) = since.names else { return Ok(()) };
        let _names = self.turn(&Scope::Namespace).await?;
        let source = self.namespace_nodes().into_iter().find(|&other| other != node);
        if source.is_none() || first >= self.first_missed(&Scope::Namespace, node).await? {
            return Ok(());
        }
        // What it missed is applied before its names are compared.
        let wanted = RepairWanted {
            source,
            reversible: true,
            ..RepairWanted::records(Some(vec![]), self.log.next_lsn(), RESTARTED)
        };
        self.replace_rows(&Scope::Namespace, node, wanted, vec![]).await
    }

    /// The first entry that it was not sent: that one, and what follows, it cannot have lost.
    async fn first_missed(&self, scope: &Scope, node: NodeIndex) -> Result<Lsn, String> {
        if scope.pairs(self)[node].pending() == 0 {
            return Ok(Lsn::MAX);
        }
        let name = &self.cluster.node(node).name;
        let rows = self.log.journal().payloads(name, scope.generation(), 1, 1).await;
        Ok(rows.map_err(not_read)?.first().map_or(Lsn::MAX, |row| row.lsn))
    }

    /// Other nodes that are up.
    fn peers(&self, node: NodeIndex) -> impl Iterator<Item = NodeIndex> {
        self.cluster.up().filter(move |&other| other != node)
    }

    async fn since(&self, checkpoint: Lsn) -> Result<Since, String> {
        let mut since = Since::default();
        let mut above = checkpoint;
        loop {
            let page = self.log.journal().intents(above, PAGE).await.map_err(not_read)?;
            let Some(last) = page.last() else { return Ok(since) };
            above = last.lsn;
            for intent in page {
                match intent.generation {
                    None => {
                        since.names.get_or_insert(intent.lsn);
                    }
                    Some(generation) => since
                        .collections
                        .entry(generation)
                        .or_default()
                        .add(intent.lsn, intent.ids),
                }
            }
        }
    }

    /// A repair row for what a node may have lost of a collection, against a node that has it. Without one, it serves
    /// what it has: it has lost nothing that anyone could give back (schedule S37).
    async fn compare_collection(
        self: &Arc<Self>,
        node: NodeIndex,
        collection: &Arc<Collection>,
        touched: Touched,
    ) -> Result<(), String> {
        let scope = Scope::Collection(collection.clone());
        let _alone = self.turn(&scope).await?;
        if collection.is_deleted() || collection.node_id(node).is_none() {
            return Ok(());
        }
        let bound = self.first_missed(&scope, node).await?;
        let ids = touched.ids_before(bound);
        if ids.as_ref().is_some_and(BTreeSet::is_empty) {
            return Ok(());
        }
        if self.recover_too(collection.generation, ids.as_ref()) {
            return Ok(());
        }
        let Some(source) = self.usable(collection).into_iter().find(|&other| other != node) else {
            return Ok(());
        };
        let wanted = RepairWanted {
            source: Some(source),
            reversible: ids.is_some(),
            ..RepairWanted::records(ids.map(|ids| ids.into_iter().collect()), self.log.next_lsn(), RESTARTED)
        };
        self.replace_rows(&scope, node, wanted, vec![]).await
    }

    /// The node is older than it was: everything may be missing. Somebody else must have it, or an operator must accept
    /// that it is lost.
    async fn admit_restored(self: &Arc<Self>, node: NodeIndex, checkpoint: Lsn, remembered: Lsn) -> Result<(), String> {
        let reason = format!("{RESTORED}: it has {checkpoint}, and had {remembered}");
        let _names = self.turn(&Scope::Namespace).await?;
        let alone = self
            .living_collections()
            .into_iter()
            .find(|one| !self.held_elsewhere(one, node));
        let names = self
            .peers(node)
            .any(|other| self.holds_all(&Scope::Namespace, other, node));
        if alone.is_some() || !names {
            let what = alone.map_or("the names".to_owned(), |one| {
                format!("the collection {}", one.facts().name)
            });
            return Err(format!(
                "{reason}; no other node that is up has everything of {what}. When it is lost for good: diptych node accept {}",
                self.cluster.node(node).name
            ));
        }
        self.copy_everything(node, &reason).await?;
        self.remember(node, vec![]).await
    }

    /// Wiped, or swapped for another server: what we know of its collections is void.
    async fn admit_changed(self: &Arc<Self>, node: NodeIndex) -> Result<(), String> {
        let _names = self.turn(&Scope::Namespace).await?;
        self.copy_everything(node, WIPED).await?;
        let name = self.cluster.node(node).name.clone();
        self.remember(node, vec![Change::ForgetNodeIds { node: name }]).await
    }

    /// Rows for all that there is, in every lane of the node. The caller holds the namespace lane.
    async fn copy_everything(self: &Arc<Self>, node: NodeIndex, reason: &str) -> Result<(), String> {
        for collection in self.living_collections() {
            let scope = Scope::Collection(collection.clone());
            let _alone = self.turn(&scope).await?;
            let void = self.rows_from(&scope, node);
            let wanted = RepairWanted::whole(self.log.next_lsn(), reason);
            self.replace_rows(&scope, node, wanted, void).await?;
        }
        // If no other node knows the names, this one does as well as any: somebody has to serve them.
        if (0..self.cluster.len()).any(|other| other != node && self.holds_all(&Scope::Namespace, other, node)) {
            self.copy_names(node, reason).await?;
        }
        Ok(())
    }

    /// The caller holds the namespace lane.
    async fn copy_names(self: &Arc<Self>, node: NodeIndex, reason: &str) -> Result<(), String> {
        let void = self.rows_from(&Scope::Namespace, node);
        let wanted = RepairWanted::whole(self.log.next_lsn(), reason);
        self.replace_rows(&Scope::Namespace, node, wanted, void).await
    }

    /// The journal was restored from a backup: positions go on above what the nodes have seen, and nobody knows what
    /// rows are missing. The first node serves, the others are compared with it.
    async fn admit_beyond(self: &Arc<Self>, node: NodeIndex, seen: Lsn) -> Result<(), String> {
        let _names = self.turn(&Scope::Namespace).await?;
        self.log.advance_past(seen).await.map_err(not_kept)?;
        for collection in self.living_collections() {
            let scope = Scope::Collection(collection.clone());
            let _alone = self.turn(&scope).await?;
            for other in 1..self.cluster.len() {
                if collection.node_id(other).is_none() || collection.pairs[other].repairs() > 0 {
                    continue;
                }
                let wanted = RepairWanted {
                    kind: RepairKind::Verify,
                    source: Some(0),
                    ..RepairWanted::whole(self.log.next_lsn(), "the log was restored from a backup")
                };
                self.replace_rows(&scope, other, wanted, vec![]).await?;
            }
        }
        self.log.store_low_water().await;
        self.remember(node, vec![]).await
    }

    /// An operator accepts what a node has: it is taken for what it should be, drains the log, and serves.
    ///
    /// # Errors
    /// Why that cannot be.
    pub async fn accept(self: &Arc<Self>, node: NodeIndex) -> Result<(), String> {
        let _one_at_a_time = self.admitting.lock().await;
        let member = self.cluster.node(node).clone();
        let held = within(&self.env, IDENTITY_LIMIT, member.client.hold()).await;
        let held = held
            .ok_or("no connection in time")?
            .map_err(|error| error.to_string())?;
        let read = within(&self.env, IDENTITY_LIMIT, read_identity(&*held))
            .await
            .unwrap_or_else(|| Err("it did not say in time who it is".to_owned()))?;
        if let Verdict::Another(other) = self.verdict(node, &read) {
            return Err(format!("it carries the marker of the node {other}"));
        }
        if read.marker.is_none() || read.marker != member.marker() {
            return Err("it is another server than it was, or an empty one: there is nothing to accept".to_owned());
        }
        let _names = self.turn(&Scope::Namespace).await?;
        let scopes: Vec<Scope> = self
            .living_collections()
            .into_iter()
            .map(Scope::Collection)
            .chain([Scope::Namespace])
            .collect();
        if let Some(scope) = scopes.iter().find(|scope| self.is_repairable(scope, node))
            && member.is_up()
        {
            let what = match scope {
                Scope::Namespace => "its names".to_owned(),
                Scope::Collection(one) => format!("its collection {}", one.facts().name),
            };
            return Err(format!(
                "it is up, and another node that has everything is about to repair {what}: what it has now is not to serve"
            ));
        }
        for scope in scopes {
            let _alone = match &scope {
                Scope::Namespace => None,
                Scope::Collection(_) => Some(self.turn(&scope).await?),
            };
            let rows = self.rows_of(&scope, node, |_| true);
            let has_it = !matches!(&scope, Scope::Collection(one) if one.node_id(node).is_none());
            // What another node can give is not given up for what this one has: it may be half a copy.
            if has_it
                && !rows.is_empty()
                && !self.is_repairable(&scope, node)
                && !self
                    .commit_or_retry(&scope, vec![node], vec![Change::RemoveRepairs(rows)])
                    .await
            {
                return Err("the log does not answer".to_owned());
            }
        }
        let record = NodeRecord {
            node: member.name.clone(),
            marker: read.marker.unwrap_or_default(),
            checkpoint: read.checkpoint.unwrap_or(0),
        };
        let changes = vec![Change::PutNode(record)];
        self.log.commit(&changes).await.map_err(not_kept)?;
        self.apply(&changes);
        tracing::warn!(node = member.name, "What the node has was accepted by an operator.");
        Ok(())
    }

    /// Whether rows are open for the node that another one, up and with everything, could carry out.
    fn is_repairable(&self, scope: &Scope, node: NodeIndex) -> bool {
        !self.rows_of(scope, node, |_| true).is_empty()
            && match scope {
                Scope::Collection(one) => self.held_elsewhere(one, node),
                Scope::Namespace => self.peers(node).any(|other| self.holds_all(scope, other, node)),
            }
    }

    /// After a `reset`, which takes our own tenant away too, in its barrier: the node is known again. If that fails, it
    /// is down until it is admitted.
    pub(crate) async fn renew_marker(self: &Arc<Self>, node: NodeIndex) {
        if let Err(reason) = self.remember(node, vec![]).await {
            self.cluster.report_unverified(node, &reason);
        }
    }

    fn living_collections(&self) -> Vec<Arc<Collection>> {
        let mut all = self.catalog.all();
        all.retain(|collection| !collection.is_deleted());
        all
    }

    /// Whether another node that is up could give a collection back.
    fn held_elsewhere(&self, collection: &Arc<Collection>, node: NodeIndex) -> bool {
        let scope = Scope::Collection(collection.clone());
        self.peers(node)
            .any(|other| collection.node_id(other).is_some() && self.holds_all(&scope, other, node))
    }

    /// Whether a node holds, alone or together with its log, what a lane holds, apart from what it was to get from
    /// `lost`, which cannot give it any more (schedule S36).
    fn holds_all(&self, scope: &Scope, node: NodeIndex, lost: NodeIndex) -> bool {
        let void = self.rows_from(scope, lost);
        let left = self.rows_of(scope, node, |id| !void.contains(&id));
        left.is_empty() && scope.pairs(self)[node].parked() == 0
    }

    /// Repair rows of other nodes that would have been carried out from this one.
    fn rows_from(&self, scope: &Scope, source: NodeIndex) -> Vec<Uuid> {
        let name = &self.cluster.node(source).name;
        let repairs = self.repairs.lock();
        let void = repairs.iter().filter(|row| {
            row.generation == scope.generation()
                && row.kind == RepairKind::Records
                && row.node != *name
                && row.source.as_ref() == Some(name)
        });
        void.map(|row| row.id).collect()
    }

    fn rows_of(&self, scope: &Scope, node: NodeIndex, which: impl Fn(Uuid) -> bool) -> Vec<Uuid> {
        let name = &self.cluster.node(node).name;
        let repairs = self.repairs.lock();
        let rows = repairs
            .iter()
            .filter(|row| row.generation == scope.generation() && row.node == *name && which(row.id));
        rows.map(|row| row.id).collect()
    }

    /// Writes a repair row in place of those that it makes superfluous, and of those in `void`. The new row has to be
    /// there even if an older one says the same: a repair under way removes that (schedule S30). The caller holds the
    /// lane.
    async fn replace_rows(
        self: &Arc<Self>,
        scope: &Scope,
        node: NodeIndex,
        mut wanted: RepairWanted,
        void: Vec<Uuid>,
    ) -> Result<(), String> {
        if scope.pairs(self)[node].uncertain() > 0 {
            return Err("the log does not say yet what it holds".to_owned());
        }
        let name = self.cluster.node(node).name.clone();
        let source = wanted.source.map(|source| self.cluster.node(source).name.clone());
        let mut gone = void;
        let mut affected: BTreeSet<NodeIndex> = BTreeSet::from([node]);
        for row in self.repairs.lock().iter() {
            if gone.contains(&row.id) {
                affected.extend(self.cluster.index_of(&row.node));
            }
            if row.generation != scope.generation() || row.node != name {
                continue;
            }
            let covered = match wanted.kind {
                RepairKind::Whole => row.kind != RepairKind::Rebuild,
                RepairKind::Records => row.reason == wanted.reason && row.source == source && row.parked.is_none(),
                RepairKind::Verify | RepairKind::Rebuild => false,
            };
            if covered {
                gone.push(row.id);
                if let (Some(ids), Some(more)) = (&mut wanted.ids, &row.ids) {
                    ids.extend(more.iter().cloned());
                }
            }
        }
        if let Some(ids) = &mut wanted.ids {
            ids.sort_unstable();
            ids.dedup();
            if ids.len() > MOST_IDS {
                wanted.kind = RepairKind::Whole;
                wanted.reversible = false;
                wanted.ids = None;
            }
        }
        let row = self.repair_row(scope, node, wanted);
        let changes = vec![Change::RemoveRepairs(gone), row];
        match self
            .commit_or_retry(scope, affected.into_iter().collect(), changes)
            .await
        {
            true => Ok(()),
            false => Err("the log does not answer".to_owned()),
        }
    }

    /// The turn in a lane, within bounds.
    async fn turn(self: &Arc<Self>, scope: &Scope) -> Result<Exclusive, String> {
        within(&self.env, LANE_LIMIT, self.exclusive_of(scope))
            .await
            .flatten()
            .ok_or_else(|| "a write that is under way holds it up".to_owned())
    }
}

fn not_kept(error: crate::journal::JournalError) -> String {
    format!("the log does not answer: {error}")
}

fn not_read(error: crate::journal::JournalError) -> String {
    format!("the log cannot be read: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Lsn = 100;

    fn read(marker: Option<&str>, checkpoint: Option<Lsn>) -> Identity {
        Identity {
            marker: marker.map(str::to_owned),
            checkpoint,
        }
    }

    /// Every combination of what is remembered, what is read, and whose marker it is.
    #[test]
    fn every_node_is_judged() {
        let others = [("other".to_owned(), "o".to_owned())];
        let remembered = [None, Some(("m", 0)), Some(("m", 50)), Some(("m", MARK))];
        let checkpoints = [None, Some(0), Some(49), Some(50), Some(51), Some(MARK), Some(MARK + 1)];
        for remembered in remembered {
            for marker in [None, Some("m"), Some("n"), Some("o")] {
                for checkpoint in checkpoints {
                    let verdict = judge(remembered, &read(marker, checkpoint), &others, MARK);
                    let said = checkpoint.unwrap_or(0);
                    let expected = match (remembered, marker) {
                        (_, Some("o")) => Verdict::Another("other".to_owned()),
                        (Some(_), None | Some("n")) => Verdict::Changed,
                        (_, _) if said > MARK => Verdict::JournalRestored { seen: said },
                        (None, _) => Verdict::First,
                        (Some((_, at)), _) if said < at => Verdict::Restored {
                            checkpoint: said,
                            remembered: at,
                        },
                        (Some(_), _) => Verdict::Returned { checkpoint: said },
                    };
                    assert_eq!(verdict, expected, "{remembered:?} {marker:?} {checkpoint:?}");
                }
            }
        }
    }

    #[test]
    fn what_was_not_sent_is_not_compared_and_too_many_are_all() {
        let ids = |count: usize| Some((0..count).map(|n| n.to_string()).collect());
        let few = |bound| {
            let mut again = Touched::default();
            again.add(1, ids(2));
            again.add(2, ids(3));
            again.add(3, None);
            again.ids_before(bound).map(|ids| ids.len())
        };
        assert_eq!((few(1), few(2), few(3), few(4)), (Some(0), Some(2), Some(3), None));
        let mut many = Touched::default();
        many.add(1, ids(MOST_IDS));
        many.add(2, ids(1));
        assert_eq!(many.ids_before(Lsn::MAX), None);
    }
}
