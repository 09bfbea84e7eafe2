//! Sending one entry to several nodes at once and waiting as long as it makes sense.
//!
//! Waiting ends when every node answered; or, for the nodes still silent, a grace period after the first one applied
//! it (a short one, if all that are silent are being drained while clients write), when health takes the node down, or at
//! the deadline. Whoever is silent then is a *straggler*: its request runs on, nothing else is sent to it for this lane,
//! and its late answer settles its own row (design.md 4.7).

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::mpsc;

use super::{Core, Doubt, Outcome, Scope};
use crate::chroma::{Op, Verdict, canonical_refusal, verdict};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse, SendError};
use crate::env::BoxFuture;

/// How often a node that says `database is locked` is asked again; it has not applied anything then.
const LOCKED_RETRIES: u32 = 6;
const LOCKED_PAUSE: Duration = Duration::from_millis(50);

/// What one node did, with its answer if it gave one.
#[derive(Debug, Clone)]
pub struct NodeAnswer {
    pub outcome: Outcome,
    pub response: Option<NodeResponse>,
}

impl NodeAnswer {
    /// The node was not asked.
    pub fn skipped() -> Self {
        Self {
            outcome: Outcome::Failed,
            response: None,
        }
    }

    fn silent() -> Self {
        Self {
            outcome: Outcome::Unknown(Doubt::Silent),
            response: None,
        }
    }
}

/// Nodes that have not answered, and where their answers will arrive.
pub struct Stragglers {
    pub nodes: Vec<NodeIndex>,
    pub answers: mpsc::Receiver<(NodeIndex, NodeAnswer)>,
}

impl Core {
    /// Runs one job per node at once; `None` is a node that is skipped. The answers come by node.
    pub async fn fan_out(
        self: &Arc<Self>,
        scope: &Scope,
        jobs: Vec<Option<BoxFuture<NodeAnswer>>>,
    ) -> (Vec<NodeAnswer>, Option<Stragglers>) {
        let count = jobs.len();
        let asked: Vec<bool> = jobs.iter().map(Option::is_some).collect();
        let (sender, mut answers) = mpsc::channel(count.max(1));
        let mut results: Vec<Option<NodeAnswer>> = Vec::with_capacity(count);
        for (node, job) in jobs.into_iter().enumerate() {
            results.push(job.is_none().then(NodeAnswer::skipped));
            if let Some(job) = job {
                let sender = sender.clone();
                self.env.spawn(Box::pin(async move {
                    let answer = job.await;
                    let _ = sender.send((node, answer)).await;
                }));
            }
        }
        drop(sender);
        let started = self.env.now();
        let deadline = self.env.sleep(self.settings.write_timeout);
        tokio::pin!(deadline);
        let mut first_applied: Option<Duration> = None;
        let mut grace: Option<BoxFuture<()>> = None;
        while results.iter().any(Option::is_none) {
            tokio::select! {
                biased;
                answer = answers.recv() => {
                    let Some((node, answer)) = answer else { break };
                    let took = self.env.now().saturating_sub(started);
                    if answer.outcome == Outcome::Applied {
                        first_applied.get_or_insert(took);
                    }
                    results[node] = Some(answer);
                    if let Some(first) = first_applied {
                        let until = first + self.grace(scope, &results, first);
                        grace = Some(self.env.sleep(until.saturating_sub(took)));
                    }
                }
                node = self.went_down(&results) => results[node] = Some(NodeAnswer::silent()),
                () = elapsed(&mut grace) => break,
                () = &mut deadline => break,
            }
        }
        // An answer that is here already is better than calling its node silent.
        let mut silent = Vec::new();
        while let Ok((node, answer)) = answers.try_recv() {
            results[node] = Some(answer);
        }
        let results = results
            .into_iter()
            .enumerate()
            .map(|(node, result)| {
                let result = result.unwrap_or_else(NodeAnswer::silent);
                if result.outcome == Outcome::Unknown(Doubt::Silent) {
                    silent.push(node);
                    scope.pairs(self)[node].straggler_started();
                    self.cluster.node(node).straggler_started();
                }
                if result.outcome == Outcome::Unknown(Doubt::Closed) {
                    scope.pairs(self)[node].require_fence();
                }
                let outcome = asked[node].then_some(&result.outcome);
                self.cluster.node(node).metrics.mirrored(outcome);
                result
            })
            .collect();
        (
            results,
            (!silent.is_empty()).then_some(Stragglers { nodes: silent, answers }),
        )
    }

    /// How long the nodes without a result are waited for after one has applied an entry, which took it so long. If all of
    /// them are being drained while clients write, that is what the brake of the drain leaves: they work on its batches, and
    /// what they miss is durable before the answer, as ever.
    fn grace(&self, scope: &Scope, results: &[Option<NodeAnswer>], took: Duration) -> Duration {
        let usual = self.settings.mirror_grace;
        let silent = (0..results.len()).filter(|&node| results[node].is_none());
        let patience = match scope {
            Scope::Collection(_) => self.foreground.patience(self.env.now(), silent),
            // What a node misses of the names takes more than its row to be forgotten (`settles_by_itself`).
            Scope::Namespace => None,
        };
        let grace = patience.map_or(usual, |patience| patience.saturating_sub(took).min(usual));
        grace.max(took / 2)
    }

    /// Asks nodes whose answers speak of another past than theirs who they are: one that lacks a collection that the
    /// catalog has on it, and, where the lead refused what another applied, both. A node that is not the one it was has
    /// not applied anything of this lane, and is out (schedules S4, S36).
    pub(super) async fn recheck(&self, answers: &mut [NodeAnswer]) {
        let lead_refused = answers
            .iter()
            .find(|answer| matches!(answer.outcome, Outcome::Applied | Outcome::Refused { .. }))
            .is_some_and(|lead| matches!(lead.outcome, Outcome::Refused { .. }));
        let disagree = lead_refused && answers.iter().any(|answer| answer.outcome == Outcome::Applied);
        for (node, answer) in answers.iter_mut().enumerate() {
            let odd = match answer.outcome {
                Outcome::Missing => true,
                Outcome::Applied | Outcome::Refused { .. } => disagree,
                _ => false,
            };
            if odd && !self.marker_is_unchanged(node).await {
                let was_applied = answer.outcome == Outcome::Applied;
                *answer = NodeAnswer::skipped();
                if was_applied {
                    // It may have died since with what it applied, and come back with it.
                    answer.outcome = Outcome::Unknown(Doubt::Silent);
                }
            }
        }
    }

    /// The next node without a result that is down.
    async fn went_down(&self, results: &[Option<NodeAnswer>]) -> NodeIndex {
        let mut waits: Vec<_> = (0..results.len())
            .filter(|&node| results[node].is_none())
            .map(|node| {
                Box::pin(async move {
                    self.cluster.node(node).until_down().await;
                    node
                })
            })
            .collect();
        std::future::poll_fn(move |context| {
            for wait in &mut waits {
                if let Poll::Ready(node) = wait.as_mut().poll(context) {
                    return Poll::Ready(node);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Sends one request to one node and judges the answer; an answer that says `database is locked` is asked again.
    pub async fn send_judged(self: &Arc<Self>, node: NodeIndex, op: &Op, request: NodeRequest, ids: Ids) -> NodeAnswer {
        let mut pause = LOCKED_PAUSE;
        for _ in 0..LOCKED_RETRIES {
            let answer = self.send_once(node, op, request.clone(), ids).await;
            match answer {
                Ok(answer) => return answer,
                Err(Locked) => self.env.sleep(pause).await,
            }
            pause *= 2;
        }
        NodeAnswer {
            outcome: Outcome::Failed,
            response: None,
        }
    }

    async fn send_once(&self, node: NodeIndex, op: &Op, request: NodeRequest, ids: Ids) -> Result<NodeAnswer, Locked> {
        if !self.may_write(op).await {
            return Ok(NodeAnswer::skipped());
        }
        let sent = self.env.now();
        let answer = self.send(node, request).await;
        let took = self.env.now().saturating_sub(sent);
        self.cluster.node(node).metrics.upstream(op.label(), took);
        tracing::debug!(node = self.cluster.node(node).name, op = op.label(), took = ?took, "A node answered.");
        let response = match answer {
            Ok(response) => response,
            Err(SendError::NotSent(_) | SendError::Local(_)) => {
                return Ok(NodeAnswer {
                    outcome: Outcome::Failed,
                    response: None,
                });
            }
            Err(SendError::Broken(_)) => {
                return Ok(NodeAnswer {
                    outcome: Outcome::Unknown(Doubt::Closed),
                    response: None,
                });
            }
        };
        let sign = || canonical_refusal(&response.body, ids.node, ids.client);
        let outcome = match verdict(op, response.status, &response.body) {
            Verdict::Applied => Outcome::Applied,
            Verdict::Refused => Outcome::Refused { sign: sign() },
            Verdict::NotApplied => Outcome::Failed,
            Verdict::Locked => return Err(Locked),
            Verdict::Missing => Outcome::Missing,
            Verdict::Unknown => Outcome::Unknown(Doubt::Answered { sign: sign() }),
        };
        Ok(NodeAnswer {
            outcome,
            response: Some(response),
        })
    }

    /// Sends to a node; a connect failure takes it down at once.
    pub async fn send(&self, node: NodeIndex, request: NodeRequest) -> Result<NodeResponse, SendError> {
        let outcome = self.cluster.node(node).client.send(request).await;
        if let Err(SendError::NotSent(reason)) = &outcome {
            self.cluster.report_connect_failure(node, reason);
        }
        outcome
    }
}

/// A collection's UUID on the node that is asked, and the one that clients see.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ids {
    pub node: Option<uuid::Uuid>,
    pub client: Option<uuid::Uuid>,
}

struct Locked;

async fn elapsed(timer: &mut Option<BoxFuture<()>>) {
    match timer {
        Some(timer) => timer.await,
        None => std::future::pending().await,
    }
}
