//! Somebody who reads all the time, also while all is being made well again: who serves too early is seen by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use crate::client::Client;
use crate::plan::milliseconds;
use crate::world::World;

/// So many reads in one phase.
const MOST: usize = 200;
/// Pauses between two of them.
const PAUSES: [u64; 3] = [10, 100, 600];

pub struct Watcher {
    over: Arc<AtomicBool>,
    ended: oneshot::Receiver<()>,
}

impl Watcher {
    pub fn start(world: &Arc<World>, mut client: Client) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let its_over = over.clone();
        let ended = world.executor.run(async move {
            for _ in 0..MOST {
                let longest = PAUSES[client.rng.below(PAUSES.len() as u64) as usize];
                let pause = client.rng.below(longest);
                let world = client.shared.world.clone();
                tokio::select! {
                    biased;
                    () = world.until_return() => {}
                    () = tokio::time::sleep(milliseconds(pause)) => {}
                }
                if its_over.load(Ordering::Relaxed) {
                    return;
                }
                client.look().await;
            }
        });
        Self { over, ended }
    }

    /// Lets it end with the read that is under way.
    pub async fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.ended.await;
    }
}
