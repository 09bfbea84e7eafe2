//! Runs tasks one poll at a time, in an order that only the seed decides.
//!
//! Tokio wakes those who wait at a `watch` channel in an order of its own, other in each run. Here whoever is woken joins
//! a set, and the seed draws from it: the same run every time, and other schedules from other seeds. Time, timers and
//! channels are Tokio's; its clock moves on when nobody is ready.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use diptych::env::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::fakes::Rng;

/// Whose task it is; the world's own is [`WORLD`].
pub type Owner = u64;
pub const WORLD: Owner = 0;

struct Task {
    owner: Owner,
    /// `None` while it is polled.
    future: Option<BoxFuture<()>>,
}

struct Inner {
    tasks: BTreeMap<u64, Task>,
    ready: BTreeSet<u64>,
    next: u64,
    rng: Rng,
    /// Wakes the executor itself.
    waker: Option<Waker>,
}

pub struct Executor {
    inner: Mutex<Inner>,
}

/// What the executor asks before it polls a task, and tells when one panics.
pub trait Watch {
    fn may_poll(&self, owner: Owner) -> bool;
    fn panicked(&self, text: &str);
    fn is_over(&self) -> bool;
}

struct TaskWaker {
    executor: Arc<Executor>,
    id: u64,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut inner = self.executor.inner.lock();
        if inner.tasks.contains_key(&self.id) {
            inner.ready.insert(self.id);
        }
        let waker = inner.waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Executor {
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                tasks: BTreeMap::new(),
                ready: BTreeSet::new(),
                next: 0,
                rng: Rng::new(seed),
                waker: None,
            }),
        })
    }

    pub fn spawn(&self, owner: Owner, future: BoxFuture<()>) {
        let mut inner = self.inner.lock();
        inner.next += 1;
        let id = inner.next;
        let task = Task {
            owner,
            future: Some(future),
        };
        inner.tasks.insert(id, task);
        inner.ready.insert(id);
        if let Some(waker) = inner.waker.take() {
            waker.wake();
        }
    }

    /// A task of the world's own, and what it comes to.
    pub fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> oneshot::Receiver<T> {
        let (done, outcome) = oneshot::channel();
        self.spawn(
            WORLD,
            Box::pin(async move {
                let _ = done.send(work.await);
            }),
        );
        outcome
    }

    /// Drops all tasks of an owner; one that is being polled right now is dropped after that.
    pub fn drop_all_of(&self, owner: Owner) {
        let dropped: Vec<Task> = {
            let mut inner = self.inner.lock();
            let ids: Vec<u64> = inner
                .tasks
                .iter()
                .filter(|(_, task)| task.owner == owner)
                .map(|(id, _)| *id)
                .collect();
            ids.iter().for_each(|id| {
                inner.ready.remove(id);
            });
            ids.iter().filter_map(|id| inner.tasks.remove(id)).collect()
        };
        drop(dropped);
    }

    /// The next task to poll, drawn from those that are ready.
    fn draw(&self) -> Option<(u64, Owner, BoxFuture<()>)> {
        let mut inner = self.inner.lock();
        let count = inner.ready.len() as u64;
        if count == 0 {
            return None;
        }
        let at = usize::try_from(inner.rng.below(count)).unwrap_or_default();
        let id = *inner.ready.iter().nth(at)?;
        inner.ready.remove(&id);
        let task = inner.tasks.get_mut(&id)?;
        Some((id, task.owner, task.future.take()?))
    }

    fn put_back(&self, id: u64, future: BoxFuture<()>) {
        let mut inner = self.inner.lock();
        match inner.tasks.get_mut(&id) {
            Some(task) => task.future = Some(future),
            None => {
                drop(inner);
                drop(future);
            }
        }
    }

    /// Polls until `watch` says that it is over.
    pub async fn drive(self: &Arc<Self>, watch: &impl Watch) {
        std::future::poll_fn(|context| {
            loop {
                if watch.is_over() {
                    return Poll::Ready(());
                }
                let Some((id, owner, mut future)) = self.draw() else {
                    self.inner.lock().waker = Some(context.waker().clone());
                    return Poll::Pending;
                };
                let waker = Waker::from(Arc::new(TaskWaker {
                    executor: self.clone(),
                    id,
                }));
                if !watch.may_poll(owner) {
                    self.put_back(id, future);
                    continue;
                }
                let mut own = Context::from_waker(&waker);
                let polled = std::panic::catch_unwind(AssertUnwindSafe(|| Pin::new(&mut future).poll(&mut own)));
                match polled {
                    Ok(Poll::Pending) => self.put_back(id, future),
                    Ok(Poll::Ready(())) => drop(self.inner.lock().tasks.remove(&id)),
                    Err(panic) => {
                        let text = panic.downcast_ref::<String>().map(String::as_str);
                        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                        watch.panicked(text.unwrap_or("?"));
                        drop(self.inner.lock().tasks.remove(&id));
                    }
                }
            }
        })
        .await;
    }

    /// Drops everything: tasks hold what holds the executor.
    pub fn clear(&self) {
        let tasks = std::mem::take(&mut self.inner.lock().tasks);
        drop(tasks);
    }
}
