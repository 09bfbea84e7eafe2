//! Making records of one node equal to another's, some at a time; and the repair of some records, in the lane.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use serde_json::json;
use tokio::sync::oneshot;

use super::compare::{self, Mend, Record, Space};
use super::read::{self, Object, Place, describe};
use super::{Trouble, props};
use crate::catalog::Collection;
use crate::chroma::{DeleteBody, Op, node_path};
use crate::cluster::{NodeIndex, NodeRequest};
use crate::drain::drain_rest;
use crate::fault;
use crate::journal::{Change, RepairRow};
use crate::mirror::{Core, Ids, NodeAnswer, Outcome, Scope};

/// Records that are read and compared in one go while the lane is held.
const IN_LANE: usize = 250;
/// How long the lane waits for one of our writes to a node that does not answer.
const LANE_PATIENCE: Duration = Duration::from_secs(10);
/// A canary has to return in so much time before anything is sent.
const FENCE_LIMIT: Duration = Duration::from_secs(60);
/// Beyond that many records, the collection is copied without holding the lane.
pub(super) const MOST_IN_LANE: usize = 5000;

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
    /// Bytes read from the source.
    pub bytes: usize,
}

impl Job {
    pub(super) fn scope(&self) -> Scope {
        Scope::Collection(self.collection.clone())
    }

    fn place(&self, node: NodeIndex) -> Result<Place, Trouble> {
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

    /// Whatever was on its way to the target has landed, or never will.
    pub(super) async fn fence(&self) -> Result<(), Trouble> {
        let node = self.core.cluster.node(self.target);
        match crate::env::within(&self.core.env, FENCE_LIMIT, node.canary()).await {
            Some(Ok(())) => {
                self.collection.pairs[self.target].fenced();
                Ok(())
            }
            _ => Err(Trouble::Wait("no canary write returns".to_owned())),
        }
    }

    /// Makes visible what either node has committed and hides (rule R5, schedule S15).
    pub(super) async fn flush(&self) -> Result<(), Trouble> {
        let source = self.from()?;
        if !self.core.flush(&self.collection, source.node).await {
            return match self.core.is_alive(source.node).await {
                true => Err(source.trouble("a write that makes everything visible failed")),
                false => Err(Trouble::Wait("the source went away".to_owned())),
            };
        }
        let nobody = DeleteBody::delete_ids_body(&[self.core.env.new_id().to_string()]);
        self.write(Op::Delete, nobody, LANE_PATIENCE).await
    }

    /// Reads some records of both nodes and compares them; says what to write.
    async fn compare(&self, ids: &[String], on_target: &[String], space: Space) -> Result<(Mend, Found), Trouble> {
        let (source, bytes) = read::records(&self.core, &self.collection, self.from()?, ids).await?;
        let target = match on_target.is_empty() {
            true => vec![],
            false => {
                read::records(&self.core, &self.collection, self.to()?, on_target)
                    .await?
                    .0
            }
        };
        let mend = compare::mend(ids.iter().map(String::as_str), &source, &target, space)
            .map_err(|unreadable| Trouble::Source(unreadable.to_string()))?;
        let differing = mend.ids.clone();
        Ok((mend, Found { differing, bytes }))
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
        let differing = ids.iter().filter(differs).cloned().collect();
        Ok(Found { differing, bytes })
    }

    /// Makes these records of the target equal to the source's. `on_target`: those of them that it may have.
    pub(super) async fn equalise(
        &self,
        ids: &[String],
        on_target: &[String],
        space: Space,
        patience: Duration,
    ) -> Result<Found, Trouble> {
        let (mend, found) = self.compare(ids, on_target, space).await?;
        let writes = [
            (Op::Delete, mend.delete),
            (Op::Add, mend.add),
            (Op::Upsert, mend.upsert),
        ];
        for (op, body) in writes {
            if let Some(body) = body {
                self.write(op, body, patience).await?;
            }
        }
        Ok(found)
    }

    /// [`Job::equalise`] while holding the lane: in small steps, and what was written is read back.
    pub(super) async fn equalise_in_lane(&self, ids: &[String], space: Space) -> Result<(), Trouble> {
        for part in ids.chunks(IN_LANE) {
            let found = self.equalise(part, part, space, LANE_PATIENCE).await?;
            let written: Vec<String> = found.differing.into_iter().collect();
            let left = self.differing(&written, space).await?.differing;
            if let Some(id) = left.first() {
                let why = format!("{} records differ after they were written, {id} for one", left.len());
                return Err(Trouble::Target(why));
            }
        }
        Ok(())
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

/// Carries out rows that name records: in the lane, in place.
pub(super) async fn run(job: &Job, rows: &[RepairRow]) -> Result<(), Trouble> {
    let core = &job.core;
    // Names and metadata are a matter of the namespace lane, which is taken before a collection's (R4).
    let of_collection = rows.iter().any(|row| row.ids.as_ref().is_some_and(Vec::is_empty));
    let _names = match of_collection {
        true => core.exclusive_namespace().await,
        false => None,
    };
    let _alone = core.exclusive(&job.collection).await;
    job.check()?;
    // Only rows that were there before the source is read (S30).
    let open = super::still_open(core, rows);
    let ids: BTreeSet<String> = open.iter().flat_map(|row| row.ids.iter().flatten().cloned()).collect();
    job.fence().await?;
    if !drain_rest(core, job.target, &job.scope()).await {
        return Err(Trouble::Wait("what the node missed is not drained".to_owned()));
    }
    job.flush().await?;
    let (source, target) = job.objects().await?;
    if of_collection {
        props::equalise(job, &source, &target).await?;
    }
    let ids: Vec<String> = ids.into_iter().collect();
    job.equalise_in_lane(&ids, source.space()).await?;
    let (source, target) = job.objects().await?;
    job.equalise_dimension(&source, &target).await?;
    fault::point("records-mended");
    let changes = vec![Change::RemoveRepairs(open.iter().map(|row| row.id).collect())];
    core.commit_or_retry(&job.scope(), vec![job.target], changes).await;
    tracing::info!(
        node = core.cluster.node(job.target).name,
        generation = job.collection.generation,
        records = ids.len(),
        "Repaired."
    );
    Ok(())
}
