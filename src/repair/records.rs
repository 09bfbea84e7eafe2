//! Making records of one node equal to another's, some at a time; and the repair of some records, in the lane.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use serde_json::json;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::compare::{self, Mend, Record, Space};
use super::read::{self, Object, Place, describe};
use super::{Trouble, props};
use crate::catalog::Collection;
use crate::chroma::{DeleteBody, Op, node_path};
use crate::cluster::{NodeIndex, NodeRequest};
use crate::drain::{drain_rest, records_in};
use crate::fault;
use crate::journal::{Change, PayloadRow, RepairRow};
use crate::lane::Exclusive;
use crate::mirror::{Core, Ids, NodeAnswer, Outcome, RepairWanted, Scope};

/// Records that are read and compared in one go while the lane is held.
const IN_LANE: usize = 250;
/// Of one write; Chroma takes 40 MiB (chroma-facts.md 7).
const MOST_BYTES: usize = 16 << 20;
/// How long the lane waits for one of our writes to a node that does not answer.
const LANE_PATIENCE: Duration = Duration::from_secs(10);
/// A canary has to return in so much time before anything is sent.
const FENCE_LIMIT: Duration = Duration::from_secs(60);
/// So many are made equal before the lane is given back to the writers for a moment.
const IN_TURN: usize = 1000;
/// Beyond that many records, the collection is copied without holding the lane.
pub(crate) const MOST_IN_LANE: usize = 100_000;

/// A collection, from where, to where.
#[derive(Clone)]
pub(super) struct Job {
    pub core: Arc<Core>,
    pub collection: Arc<Collection>,
    pub source: NodeIndex,
    pub target: NodeIndex,
}

/// What a reconciliation found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Records that differed.
    pub differing: BTreeSet<String>,
    /// Records that differ and were left alone, since the source cannot show their embedding.
    pub unreadable: BTreeSet<String>,
    /// Bytes read from the source.
    pub bytes: usize,
}

/// What a reconciliation in the lane leaves for the commit that ends it.
#[derive(Debug, Default)]
pub(super) struct Mended {
    /// Entries that were logged on the way: they go with the repair row.
    pub logged: Vec<Uuid>,
    /// Records that the source cannot show: a repair row goes on naming them.
    pub unreadable: BTreeSet<String>,
    /// How many of those the target does not have at all.
    pub absent: usize,
}

impl Job {
    pub(super) fn scope(&self) -> Scope {
        Scope::Collection(self.collection.clone())
    }

    pub(super) fn place(&self, node: NodeIndex) -> Result<Place, Trouble> {
        let is_source = node == self.source;
        match self.collection.node_id(node) {
            Some(id) => Ok(Place { node, id, is_source }),
            None if is_source => Err(Trouble::Wait("the source does not have the collection".to_owned())),
            None => Err(Trouble::Absent),
        }
    }

    pub(super) fn from(&self) -> Result<Place, Trouble> {
        self.place(self.source)
    }

    pub(super) fn to(&self) -> Result<Place, Trouble> {
        self.place(self.target)
    }

    /// Whether what this rests on still holds: to be asked while holding the lane, before anything is read.
    pub(super) fn check(&self) -> Result<(), Trouble> {
        let pair = &self.collection.pairs[self.target];
        let core = &self.core;
        let wait = |why: &str| Err(Trouble::Wait(why.to_owned()));
        if self.collection.is_deleted() {
            return wait("the collection was deleted");
        }
        if !core.cluster.node(self.target).is_up() {
            return wait("the node is down");
        }
        if pair.stragglers() > 0 || pair.uncertain() > 0 {
            return wait("something is still on its way to the node, or to the log");
        }
        if !core.usable(&self.collection).contains(&self.source) {
            return wait("the source is not in step");
        }
        if core.log.is_fenced() || super::is_paused(core) {
            return wait("paused");
        }
        Ok(())
    }

    /// Whatever was on its way to the target has landed, or never will. So has what may have been on its way to the source,
    /// whose connection broke as well: it is served on, but what is read there before that is not what it will have.
    pub(super) async fn fence(&self) -> Result<(), Trouble> {
        let pairs = &self.collection.pairs;
        let source = pairs[self.source].needs_fence().then_some(self.source);
        for node in source.into_iter().chain([self.target]) {
            if !self.core.fence(&pairs[node], node, FENCE_LIMIT).await {
                return Err(Trouble::Wait("no canary write returns".to_owned()));
            }
        }
        Ok(())
    }

    /// A turn alone in the lane, with the target drained and both nodes flushed: what is read now is comparable (R5).
    ///
    /// Writers wait meanwhile. So the canary goes before: nothing new is sent to the target in this lane before its turn,
    /// and what breaks all the same asks for another one.
    pub(super) async fn turn(&self) -> Result<Option<Exclusive>, Trouble> {
        self.fence().await?;
        let alone = self.core.exclusive(&self.collection).await;
        self.check()?;
        if [self.source, self.target]
            .iter()
            .any(|&node| self.collection.pairs[node].needs_fence())
        {
            self.fence().await?;
        }
        if !drain_rest(&self.core, self.target, &self.scope()).await {
            return Err(Trouble::Wait("what the node missed is not drained".to_owned()));
        }
        self.flush().await?;
        Ok(alone)
    }

    /// Makes visible what either node has committed and hides (rule R5, schedule S15).
    pub(super) async fn flush(&self) -> Result<(), Trouble> {
        let source = self.from()?;
        let nobody = DeleteBody::delete_ids_body(&[self.core.env.new_id().to_string()]);
        let (is_flushed, written) = tokio::join!(
            self.core.flush(&self.collection, source.node),
            self.write(Op::Delete, nobody, LANE_PATIENCE)
        );
        if !is_flushed {
            return match self.core.is_alive(source.node).await {
                true => Err(source.trouble("a write that makes everything visible failed")),
                false => Err(Trouble::Wait("the source went away".to_owned())),
            };
        }
        written
    }

    /// Reads some records of both nodes and compares them; says what to write.
    async fn compare(&self, ids: &[String], on_target: &[String], space: Space) -> Result<(Mend, Found), Trouble> {
        let (from, to) = (self.from()?, self.to()?);
        let (source, target) = tokio::join!(read::records(&self.core, &self.collection, from, ids), async {
            match on_target.is_empty() {
                true => Ok((vec![], 0)),
                false => read::records(&self.core, &self.collection, to, on_target).await,
            }
        });
        let ((source, bytes), (target, _)) = (source?, target?);
        let mend = compare::mend(ids.iter().map(String::as_str), &source, &target, space);
        let found = Found {
            differing: mend.ids.clone(),
            unreadable: mend.unreadable.clone(),
            bytes,
        };
        Ok((mend, found))
    }

    /// Which of these records differ.
    pub(super) async fn differing(&self, ids: &[String], space: Space) -> Result<Found, Trouble> {
        let (source, bytes) = read::records(&self.core, &self.collection, self.from()?, ids).await?;
        let (target, _) = read::records(&self.core, &self.collection, self.to()?, ids).await?;
        let by_id = |records: Vec<Record>| -> std::collections::BTreeMap<String, Record> {
            records.into_iter().map(|record| (record.id.clone(), record)).collect()
        };
        let (source, target) = (by_id(source), by_id(target));
        let differs = |id: &&String| match (source.get(*id), target.get(*id)) {
            (Some(a), Some(b)) => !compare::same(a, b, space),
            (None, None) => false,
            _ => true,
        };
        Ok(Found {
            differing: ids.iter().filter(differs).cloned().collect(),
            unreadable: BTreeSet::new(),
            bytes,
        })
    }

    /// Makes these records of the target equal to the source's. `on_target`: those of them that it may have.
    pub(super) async fn equalise(
        &self,
        ids: &[String],
        on_target: &[String],
        space: Space,
        patience: Duration,
    ) -> Result<Found, Trouble> {
        let mut all = Found::default();
        let mut parts = vec![ids];
        while let Some(part) = parts.pop() {
            let there: Vec<String> = match part.len() == ids.len() {
                true => on_target.to_vec(),
                false => on_target.iter().filter(|id| part.contains(id)).cloned().collect(),
            };
            let (mend, found) = self.compare(part, &there, space).await?;
            if let Some((first, second)) = halves(part, &mend) {
                parts.extend([second, first]);
                continue;
            }
            self.carry_out(mend, patience).await?;
            all.bytes += found.bytes;
            all.differing.extend(found.differing);
            all.unreadable.extend(found.unreadable);
        }
        Ok(all)
    }

    /// Before records are appended that stand elsewhere on the source: pages are read from the source from now on, also
    /// after a crash that lets the next repair find nothing to do (schedule S28).
    pub(super) async fn pin(&self) -> Result<(), Trouble> {
        let Some(change) = self.core.pin_reads(&self.collection, self.source) else {
            return Ok(());
        };
        let changes = vec![change];
        match self.core.log.commit_until_known(&changes).await {
            true => {
                self.core.apply(&changes);
                Ok(())
            }
            false => Err(Trouble::Wait("the log does not answer".to_owned())),
        }
    }

    async fn carry_out(&self, mend: Mend, patience: Duration) -> Result<(), Trouble> {
        // Nothing is added: an update of an id that the node did not have may be in its log, and then a race of readers
        // gives the record that update's embedding, long after this (chroma-facts.md 18.2).
        let writes = [
            (Op::Delete, mend.delete),
            (Op::Upsert, mend.append),
            (Op::Upsert, mend.upsert),
        ];
        for (op, body) in writes {
            let Some(body) = body else { continue };
            if let Err(trouble) = self.write(op.clone(), body.clone(), patience).await {
                // It may be carried out yet, after the next canary and the next try even (schedule S11).
                let ids = records_in(&op, &body).unwrap_or_default();
                let generation = self.collection.generation;
                self.core.put_suspects(self.target, generation, ids, vec![]).await;
                return Err(trouble);
            }
        }
        Ok(())
    }

    /// Before a record is deleted that is added again, the add is made durable as an entry that the node missed: with its
    /// log it holds every acked record at any moment, also when the source is gone before the add (schedules S17, S34).
    /// It is applied before anything else is, and does nothing where the record is still there. (An add is safe here: what
    /// its log holds of the record ends with a delete.)
    ///
    /// The caller holds the lane, and the node misses nothing else.
    async fn log_again(&self, body: Bytes) -> Result<Uuid, Trouble> {
        let (core, scope) = (&self.core, self.scope());
        let (pair, at) = (&self.collection.pairs[self.target], core.env.wall());
        let row = PayloadRow {
            id: core.env.new_id(),
            node: core.cluster.node(self.target).name.clone(),
            generation: scope.generation(),
            lsn: core.log.next_lsn(),
            op: Op::Add,
            body,
            refused: false,
            in_doubt: true,
            attempts: 0,
            parked: None,
            created_at: at,
        };
        let (id, bytes) = (row.id, row.body.len() as u64);
        pair.add_pending(1, bytes, at.timestamp_micros());
        core.behind.lock().insert((self.target, scope.generation()));
        let changes = vec![Change::InsertPayload(row)];
        match core.commit_or_retry(&scope, vec![self.target], changes).await {
            true => Ok(id),
            false => Err(Trouble::Wait("the log does not answer".to_owned())),
        }
    }

    /// [`Job::equalise`] while holding the lane: in small steps, and what was written is read back.
    pub(super) async fn equalise_in_lane(&self, ids: &[String], space: Space) -> Result<Mended, Trouble> {
        let mut mended = Mended::default();
        let mut parts: Vec<&[String]> = ids.chunks(IN_LANE).rev().collect();
        while let Some(part) = parts.pop() {
            let (mend, found) = self.compare(part, part, space).await?;
            if let Some((first, second)) = halves(part, &mend) {
                parts.extend([second, first]);
                continue;
            }
            if mend.append.is_some() {
                self.pin().await?;
            }
            if let Some(body) = mend.again.clone() {
                mended.logged.push(self.log_again(body).await?);
            }
            mended.absent += mend.absent;
            mended.unreadable.extend(found.unreadable);
            self.carry_out(mend, LANE_PATIENCE).await?;
            let written: Vec<String> = found.differing.into_iter().collect();
            let left = self.differing(&written, space).await?.differing;
            if let Some(id) = left.first() {
                let why = format!("{} records differ after they were written, {id} for one", left.len());
                return Err(Trouble::Target(why));
            }
        }
        Ok(mended)
    }

    /// A row that goes on naming records that the source cannot show (P7): all else is equal. It is tried again and again,
    /// and ends when somebody writes or deletes them. Counted already.
    pub(super) fn left_over(&self, rows: &[RepairRow], unreadable: &BTreeSet<String>) -> Change {
        let first = rows.first().and_then(|row| row.source.as_ref());
        let same_source = rows.iter().all(|row| row.source.as_ref() == first);
        let wanted = RepairWanted {
            source: first
                .filter(|_| same_source)
                .and_then(|name| self.core.cluster.index_of(name)),
            reversible: same_source && rows.iter().all(|row| row.reversible),
            ..RepairWanted::records(
                Some(unreadable.iter().cloned().collect()),
                self.core.log.next_lsn(),
                "the source cannot show the embeddings",
            )
        };
        self.core.repair_row(&self.scope(), self.target, wanted)
    }

    /// One write to the target. It runs on when nobody waits for it any more, as a straggler's.
    async fn write(&self, op: Op, body: Bytes, patience: Duration) -> Result<(), Trouble> {
        let place = self.to()?;
        let facts = self.collection.facts();
        let path = node_path::record(&facts.tenant, &facts.database, place.id, op.label());
        self.send(op, NodeRequest::post(path, body), patience).await
    }

    /// A change of the collection itself on the target.
    pub(super) async fn modify(&self, body: Bytes) -> Result<(), Trouble> {
        let place = self.to()?;
        let facts = self.collection.facts();
        let path = node_path::collection(&facts.tenant, &facts.database, place.id);
        let op = Op::ModifyCollection {
            generation: self.collection.generation,
            new_name: None,
        };
        self.send(op, NodeRequest::new(Method::PUT, path, Some(body)), LANE_PATIENCE)
            .await
    }

    async fn send(&self, op: Op, request: NodeRequest, patience: Duration) -> Result<(), Trouble> {
        let (done, mut answered) = oneshot::channel();
        let job = self.clone();
        let ids = Ids {
            node: self.collection.node_id(self.target),
            client: Some(self.collection.client_id),
        };
        self.core.spawn_job(async move {
            let _ = done.send(job.core.send_judged(job.target, &op, request, ids).await);
        });
        let answer: Option<NodeAnswer> = tokio::select! {
            biased;
            answer = &mut answered => answer.ok(),
            () = self.core.cluster.node(self.target).until_down() => None,
            () = self.core.env.sleep(patience) => None,
        };
        let Some(answer) = answer else {
            let straggler = self.core.straggler(&self.scope(), self.target);
            self.core.env.spawn(Box::pin(async move {
                let _ = answered.await;
                drop(straggler);
            }));
            return Err(Trouble::Wait("the node does not answer".to_owned()));
        };
        let text = || answer.response.as_ref().map_or("no answer".to_owned(), describe);
        match answer.outcome {
            Outcome::Applied => Ok(()),
            // It could not, and said so.
            Outcome::Failed => Err(Trouble::Wait(text())),
            Outcome::Unknown(_) if answer.response.is_none() && !self.core.is_alive(self.target).await => {
                Err(Trouble::Wait("the node went away".to_owned()))
            }
            Outcome::Missing => Err(Trouble::Absent),
            Outcome::Refused { .. } | Outcome::Unknown(_) => Err(Trouble::Target(text())),
        }
    }

    /// Both nodes' collection objects.
    pub(super) async fn objects(&self) -> Result<(Object, Object), Trouble> {
        let from = self.from()?;
        let Some(source) = read::object(&self.core, &self.collection, from).await? else {
            self.core.report_missing(&self.collection, from.node);
            return Err(Trouble::Source("it does not have the collection".to_owned()));
        };
        match read::object(&self.core, &self.collection, self.to()?).await? {
            Some(target) => Ok((source, target)),
            None => Err(Trouble::Absent),
        }
    }

    /// A collection's dimension is set by the first write that carries embeddings, even by one that is refused
    /// (chroma-facts.md 18.1): an update of a record that does not exist sets it and adds nothing.
    pub(super) async fn equalise_dimension(&self, source: &Object, target: &Object) -> Result<(), Trouble> {
        match (source.dimension, target.dimension) {
            (a, b) if a == b => Ok(()),
            (Some(dimension), None) => {
                let zeros = vec![0; usize::try_from(dimension).unwrap_or_default()];
                let body = json!({"ids": [self.core.env.new_id()], "embeddings": [zeros]});
                self.write(Op::Update, Bytes::from(body.to_string()), LANE_PATIENCE)
                    .await
            }
            (a, b) => Err(Trouble::Incurable(format!(
                "its dimension is {b:?}, the source's {a:?}"
            ))),
        }
    }
}

/// Two parts of what would be too much for one request; one record goes whole, as it came.
fn halves<'a>(part: &'a [String], mend: &Mend) -> Option<(&'a [String], &'a [String])> {
    let largest = [&mend.delete, &mend.append, &mend.upsert]
        .into_iter()
        .flatten()
        .map(Bytes::len)
        .max();
    (part.len() > 1 && largest > Some(MOST_BYTES)).then(|| part.split_at(part.len() / 2))
}

/// Carries out rows that name records: in the lane, in place.
///
/// Many are made equal in several turns. What is written between two turns the target gets by its log, in order, since it
/// is out of step; and so what an earlier turn has made equal stays so.
pub(super) async fn run(job: &Job, rows: &[RepairRow]) -> Result<(), Trouble> {
    let core = &job.core;
    // Only rows that were there before the source is read (S30).
    let open = super::still_open(core, rows);
    if open.is_empty() {
        return Ok(());
    }
    let ids: BTreeSet<String> = open.iter().flat_map(|row| row.ids.iter().flatten().cloned()).collect();
    let ids: Vec<String> = ids.into_iter().collect();
    let of_collection = open.iter().any(|row| row.ids.as_ref().is_some_and(Vec::is_empty));
    let disturbed = job.collection.pairs[job.source].disturbances();
    let mut unreadable = BTreeSet::new();
    let turns = ids.len().div_ceil(IN_TURN).max(1);
    for turn in 1..=turns {
        let part = &ids[(turn - 1) * IN_TURN..ids.len().min(turn * IN_TURN)];
        let is_last = turn == turns;
        // Names and metadata are a matter of the namespace lane, which is taken before a collection's (R4).
        let _names = match of_collection && is_last {
            true => core.exclusive_namespace().await,
            false => None,
        };
        let _alone = job.turn().await?;
        if job.collection.pairs[job.source].disturbances() != disturbed {
            return Err(Trouble::Wait("the source needed a repair itself".to_owned()));
        }
        let (source, target) = job.objects().await?;
        if of_collection && is_last {
            props::equalise(job, &source, &target).await?;
        }
        let mended = job.equalise_in_lane(part, source.space()).await?;
        unreadable.extend(mended.unreadable);
        let mut changes = vec![Change::RemovePayloads(mended.logged)];
        if is_last {
            let (source, target) = job.objects().await?;
            job.equalise_dimension(&source, &target).await?;
            fault::point("records-mended");
            // What stands for them already is not written anew at every try.
            if unreadable.is_empty() || unreadable.len() < ids.len() || open.len() > 1 {
                changes.push(Change::RemoveRepairs(open.iter().map(|row| row.id).collect()));
                if !unreadable.is_empty() {
                    changes.push(job.left_over(&open, &unreadable));
                }
            }
        }
        // What was logged counts until the repair rows are gone; there are no other entries.
        job.collection.pairs[job.target].drained();
        core.behind.lock().remove(&(job.target, job.scope().generation()));
        if !core.commit_or_retry(&job.scope(), vec![job.target], changes).await && !is_last {
            return Err(Trouble::Wait("the log does not answer".to_owned()));
        }
    }
    if let Some(id) = unreadable.first() {
        return Err(Trouble::Source(format!(
            "it cannot show the embeddings of {} records, {id:?} for one; write or delete them",
            unreadable.len()
        )));
    }
    tracing::info!(
        node = core.cluster.node(job.target).name,
        generation = job.collection.generation,
        records = ids.len(),
        "Repaired."
    );
    Ok(())
}
