//! Writes of records: add, upsert, update, delete.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::cover::EntryInfo;
use super::{Answer, Circumstances, Core, Ids, NodeAnswer, Outcome, QueuedWrite, RecordEntry, Reply, Scope, decide};
use crate::catalog::Collection;
use crate::chroma::{DeleteBody, Op, Piece, deleted_body, node_path, parse_ids_answer, replace_uuid, splice};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse, SendError};
use crate::env::{BoxFuture, within};
use crate::fault;
use crate::journal::{Intent, Lsn};
use crate::lane::{Full, Lane, Pair};
use crate::metrics;

/// After a batch its clients' next writes are waited for this long at most, and for this share of what it took.
const LONGEST_LINGER: Duration = Duration::from_millis(5);
const LINGER_SHARE: u32 = 8;

/// What became of an entry.
struct Carried {
    answer: Answer,
    /// The lead refused it, and so has nothing of it.
    refused: bool,
}

impl From<Answer> for Carried {
    fn from(answer: Answer) -> Self {
        Self { answer, refused: false }
    }
}

impl Core {
    /// Queues a record write in its collection's lane and waits for its answer.
    pub async fn submit(self: &Arc<Self>, collection: &Arc<Collection>, entry: RecordEntry) -> Answer {
        let begun = self.env.now();
        let (reply, mut answer) = oneshot::channel();
        // A write that finds the lane free goes alone anyway.
        let may_combine = entry.filter.is_none() && collection.lane.is_busy();
        let write = QueuedWrite {
            piece: may_combine.then(|| Piece::of(&entry.body)).flatten(),
            entry,
            reply,
        };
        let place = match collection.lane.push(write) {
            Ok(place) => place,
            Err(Full::Lane) => return Answer::too_many("Too many writes wait for this collection."),
            Err(Full::Everything) => return Answer::unavailable("Too many bytes of writes wait."),
        };
        if place.starts_worker {
            self.start_worker(collection.clone());
        }
        let limit = self.settings.lanes.time;
        let in_time = match limit {
            Duration::ZERO => None,
            limit => Some(within(&self.env, limit, &mut answer).await),
        };
        let answer = match in_time {
            Some(Some(answer)) => answer,
            Some(None) if collection.lane.withdraw(place) => {
                return Answer::unavailable("The write waited too long for its turn and was not begun.");
            }
            _ => answer.await,
        };
        let now = self.env.now();
        self.foreground.answered(now, now.saturating_sub(begun));
        tracing::debug!(generation = collection.generation, took = ?now.saturating_sub(begun), "A write was answered.");
        answer.unwrap_or_else(|_| Answer::error(500, "InternalError", "The write was dropped."))
    }

    /// Carries out writes as one entry; runs alone in the collection's lane. A batch that is refused is halved until it
    /// is known whose fault it was: each client gets the answer that it would have got alone.
    pub(super) async fn write_records(self: &Arc<Self>, collection: &Arc<Collection>, writes: Vec<QueuedWrite>) {
        let mut parts = vec![writes];
        while let Some(mut writes) = parts.pop() {
            metrics::mirrored_batch(writes.len());
            let carried = match writes.as_mut_slice() {
                [one] => self.carry_out(collection, &mut one.entry).await,
                several => self.carry_out(collection, &mut combined(several)).await,
            };
            let carried = carried.unwrap_or_else(Carried::from);
            if carried.refused && writes.len() > 1 {
                let second = writes.split_off(writes.len() / 2);
                parts.extend([second, writes]);
                continue;
            }
            let several = writes.len() > 1;
            for write in writes {
                let mut answer = carried.answer.clone();
                if several && write.entry.op == Op::Delete && (200..300).contains(&answer.status) {
                    answer.body = deleted_body(write.entry.ids.len());
                }
                let _ = write.reply.send(answer);
            }
        }
    }

    /// Gives the clients of a batch a moment to come back: without it, those who always have one write under way fall
    /// into two groups that take turns. A write that found the lane free has had no company, and whoever it is next does
    /// not wait.
    pub(super) async fn await_company(&self, collection: &Collection, count: usize, took: Duration) {
        let waiting = collection.lane.waiting();
        if count + waiting < 2 || !collection.dimension_known() {
            return;
        }
        let limit = (took / LINGER_SHARE).min(LONGEST_LINGER);
        within(&self.env, limit, collection.lane.until_waiting(count + waiting)).await;
    }

    /// The nodes to send to, once it is certain that what the others miss can be kept for them.
    async fn ready_to_send(self: &Arc<Self>, collection: &Arc<Collection>) -> Result<Vec<NodeIndex>, Answer> {
        let usable = self.usable_stepping_aside(collection).await;
        if collection.is_deleted() {
            return Err(Answer::no_such_collection(collection.client_id));
        }
        if usable.is_empty() {
            return Err(Answer::unavailable("No node can serve this collection at the moment."));
        }
        if self.log.is_fenced() {
            return Err(Answer::replaced());
        }
        if usable.len() < self.cluster.len() && !self.log.is_available() {
            let reason = "A node is away and the log does not answer: the write could not be kept for it.";
            return Err(Answer::unavailable(reason));
        }
        if let Some(refused) = self.refused_without_log() {
            return Err(refused);
        }
        if collection.pairs.iter().any(Pair::is_over_limit) {
            let reason = "The log holds as much as it may for a node that is away (wal.max_bytes, wal.max_age), and no \
                          other node could give it a copy of this collection.";
            return Err(Answer::unavailable(reason));
        }
        Ok(usable)
    }

    async fn carry_out(
        self: &Arc<Self>,
        collection: &Arc<Collection>,
        write: &mut RecordEntry,
    ) -> Result<Carried, Answer> {
        let scope = Scope::Collection(collection.clone());
        let mut resolved = None;
        for last in [false, true] {
            let usable = self.ready_to_send(collection).await?;
            if let Some(filter) = write.filter.take() {
                let ids = self.resolve(collection, &usable, &filter).await?;
                if ids.is_empty() {
                    return Ok(Answer::json(200, deleted_body(0)).into());
                }
                write.body = DeleteBody::delete_ids_body(&ids);
                resolved = Some(ids.len());
                write.ids = ids;
            }
            let is_logged = self.log.is_available();
            if !is_logged {
                self.unprotected_begin(collection, &write.ids).await?;
            }
            let lsn = self.log.begin();
            if is_logged
                && !self
                    .log_intent(&scope, lsn, &write.op, Some(&write.ids), &write.body)
                    .await
            {
                self.log.settle(lsn);
                // The log has gone away just now; what can be done without it is decided anew.
                if last {
                    return Err(Answer::unavailable("The log does not answer: the write was not begun."));
                }
                continue;
            }
            fault::point("intent-logged");
            let job = |node| usable.contains(&node).then(|| self.record_job(collection, node, write));
            let jobs = (0..self.cluster.len()).map(job).collect();
            let (mut answers, stragglers) = self.fan_out(&scope, jobs).await;
            self.recheck(&mut answers).await;
            let outcomes: Vec<_> = answers.iter().map(|answer| answer.outcome.clone()).collect();
            let circumstances = Circumstances {
                refusal_has_effects: write.has_embeddings && !collection.dimension_known(),
                closed_nodes_are_alive: self.closed_nodes_are_alive(&outcomes).await,
            };
            let decision = decide(&outcomes, circumstances);
            if write.has_embeddings && outcomes.contains(&Outcome::Applied) {
                collection.set_dimension_known();
            }
            let entry = EntryInfo {
                lsn,
                op: write.op.clone(),
                body: write.body.clone(),
                ids: Some(write.ids.clone()),
            };
            fault::point("nodes-answered");
            let suspects = self.suspects_of(collection, &outcomes, &entry);
            let covered = self.cover(&scope, &decision, &entry, vec![], suspects).await;
            fault::point("entry-covered");
            if let Some(stragglers) = stragglers {
                self.await_stragglers(&scope, stragglers, covered.rows);
            }
            // Certain that no node has it: another one may be able to take it by now, drained from the log.
            let untouched = answers.iter().all(|answer| answer.response.is_none());
            if decision.reply == Reply::Unavailable && untouched && !last {
                continue;
            }
            if decision.reply != Reply::Unavailable && !self.may_write(&write.op).await {
                return Err(Answer::replaced_meanwhile());
            }
            let lead_refused =
                matches!(decision.reply, Reply::Of(lead) if matches!(outcomes[lead], Outcome::Refused { .. }));
            return Ok(Carried {
                answer: self.conclude(collection, &answers, decision.reply, covered.durable, resolved),
                refused: lead_refused && covered.durable,
            });
        }
        Err(Answer::unavailable("No node took the write."))
    }

    /// Logs what is about to be sent.
    pub(super) async fn log_intent(
        self: &Arc<Self>,
        scope: &Scope,
        lsn: Lsn,
        op: &Op,
        ids: Option<&[String]>,
        body: &Bytes,
    ) -> bool {
        let intent = Intent {
            lsn,
            generation: scope.generation(),
            op: op.clone(),
            ids: ids.map(<[String]>::to_vec),
            body: self.settings.log_payloads.then(|| body.clone()),
        };
        self.log.intend(intent).await
    }

    /// What the client is told.
    fn conclude(
        &self,
        collection: &Collection,
        answers: &[NodeAnswer],
        reply: Reply,
        durable: bool,
        resolved: Option<usize>,
    ) -> Answer {
        match reply {
            Reply::Unavailable => self.taken_by_none(Some(collection), answers),
            _ if !durable => Answer::unavailable("The log does not answer: what a node missed could not be kept."),
            Reply::Indefinite => Answer::indefinite(),
            Reply::Closed => Answer::closed(),
            Reply::Of(node) => match (&answers[node].response, resolved) {
                (Some(response), Some(count)) if response.is_success() => {
                    Answer::of_node(response, deleted_body(count))
                }
                (Some(response), _) => self.translated(collection, node, response),
                (None, _) => Answer::error(500, "InternalError", "A node's answer was lost."),
            },
        }
    }

    /// [`Core::usable_or_drained`] for the worker, which has to hand the lane over meanwhile: the drain needs it.
    async fn usable_stepping_aside(self: &Arc<Self>, collection: &Arc<Collection>) -> Vec<NodeIndex> {
        let waiting = self.usable_or_drained(collection);
        tokio::pin!(waiting);
        let mut changes = self.cluster.watch_changes();
        loop {
            changes.mark_unchanged();
            while let Some(turn) = collection.lane.next_exclusive() {
                let usable = self.usable(collection);
                if !usable.is_empty() {
                    collection.lane.put_back(turn);
                    return usable;
                }
                Lane::<QueuedWrite>::hand_over(turn).await;
            }
            tokio::select! {
                biased;
                usable = &mut waiting => return usable,
                _ = changes.changed() => {}
            }
        }
    }

    fn record_job(
        self: &Arc<Self>,
        collection: &Arc<Collection>,
        node: NodeIndex,
        write: &RecordEntry,
    ) -> BoxFuture<NodeAnswer> {
        let core = self.clone();
        let (id, client) = (collection.node_id(node), collection.client_id);
        let (op, body) = (write.op.clone(), write.body.clone());
        let facts = collection.facts();
        Box::pin(async move {
            let Some(id) = id else { return NodeAnswer::skipped() };
            let path = node_path::record(&facts.tenant, &facts.database, id, op.label());
            let ids = Ids {
                node: Some(id),
                client: Some(client),
            };
            core.send_judged(node, &op, NodeRequest::post(path, body), ids).await
        })
    }

    /// Finds the ids that a delete by filter means, on the lead, or on the next node if that fails.
    async fn resolve(
        self: &Arc<Self>,
        collection: &Arc<Collection>,
        usable: &[NodeIndex],
        filter: &DeleteBody,
    ) -> Result<Vec<String>, Answer> {
        let facts = collection.facts();
        let body = filter.as_get_body();
        let mut last = Answer::unavailable("No node could resolve the filter.");
        for &node in usable {
            let Some(id) = collection.node_id(node) else { continue };
            let path = node_path::record(&facts.tenant, &facts.database, id, "get");
            let sent = self.bounded_read(node, NodeRequest::post(path, body.clone())).await;
            let Some(response) = sent else { continue };
            if response.is_success() {
                match parse_ids_answer(&response.body) {
                    Some(ids) => return Ok(ids),
                    None => continue,
                }
            }
            if response.status == 404 {
                // The catalog has it there: that is no answer for a client, but a reason to ask the node who it is (I40).
                self.marker_is_unchanged(node).await;
                self.report_missing(collection, node);
                continue;
            }
            last = self.translated(collection, node, &response);
            if response.status < 500 {
                return Err(last);
            }
        }
        Err(last)
    }

    /// A read by the core itself: its answer, unless the node fails, goes down or takes too long. A connection that
    /// breaks is tried once more: it may have been a pooled one of a node that was restarted, and if the node is gone
    /// the second try says so.
    pub async fn bounded_read(self: &Arc<Self>, node: NodeIndex, request: NodeRequest) -> Option<NodeResponse> {
        let send = async {
            match self.send(node, request.clone()).await {
                Err(SendError::Broken(_)) => self.send(node, request).await,
                outcome => outcome,
            }
        };
        tokio::pin!(send);
        tokio::select! {
            biased;
            answer = &mut send => answer.ok(),
            () = self.cluster.node(node).until_down() => None,
            () = self.env.sleep(self.settings.read_timeout) => None,
        }
    }

    /// 503, with what the nodes said.
    pub(super) fn taken_by_none(&self, collection: Option<&Collection>, answers: &[NodeAnswer]) -> Answer {
        let mut text = "No node took the write.".to_owned();
        for (node, answer) in answers.iter().enumerate() {
            let Some(response) = &answer.response else { continue };
            let body = match collection {
                Some(collection) => self.translated(collection, node, response).body,
                None => response.body.clone(),
            };
            let said = String::from_utf8_lossy(&body[..body.len().min(200)]);
            text.push_str(&format!(" A node answered {}: {said}", response.status));
        }
        Answer::unavailable(text)
    }

    /// A node's answer as the client may see it: with the client's id of the collection.
    pub fn translated(&self, collection: &Collection, node: NodeIndex, response: &NodeResponse) -> Answer {
        let body = match collection.node_id(node) {
            Some(id) if id != collection.client_id => replace_uuid(response.body.clone(), id, collection.client_id),
            _ => response.body.clone(),
        };
        Answer::of_node(response, body)
    }
}

/// Several writes of one kind as one.
fn combined(writes: &[QueuedWrite]) -> RecordEntry {
    let members: Vec<_> = writes
        .iter()
        .filter_map(|write| Some((write.piece.as_ref()?, write.entry.body.as_ref())))
        .collect();
    RecordEntry {
        op: writes[0].entry.op.clone(),
        body: splice(&members),
        ids: writes
            .iter()
            .flat_map(|write| write.entry.ids.iter().cloned())
            .collect(),
        has_embeddings: writes.iter().any(|write| write.entry.has_embeddings),
        filter: None,
        client: None,
    }
}
