//! Notices when the kernel needs long to find a free source port towards a backend.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// The search of the kernel for source ports towards one backend.
#[derive(Debug, Default)]
pub struct PortSearch {
    /// Slow connect calls in a row.
    slow: AtomicU32,
    /// Connects left for which Ringway chooses the port.
    own_choices: AtomicU32,
}

impl PortSearch {
    /// A connect call that takes this long has searched. Otherwise it takes some 50 µs, with the handshake on loopback.
    const SLOW: Duration = Duration::from_micros(500);

    /// Slow calls in a row that are no coincidence: a thread can also lose the processor during a call.
    const IN_A_ROW: u32 = 3;

    /// Connects until the kernel is asked again.
    const OWN_CHOICES: u32 = 1000;

    /// Begins to time a connect call for which the kernel chooses the port.
    ///
    /// The wall-clock time of a call includes the time in which the thread waited for a processor. Reading the thread's
    /// own time costs a system call, so only the calls after a slow one are timed by it.
    pub fn begin(&self) -> Timer {
        if self.slow.load(Ordering::Relaxed) == 0 { Timer::Wall(Instant::now()) } else { Timer::Thread(thread_time()) }
    }

    /// Records the end of the connect call.
    pub fn end(&self, timer: &Timer) {
        match timer {
            // Several workers may have lost their processors at the same time: together they count as one.
            Timer::Wall(began) if began.elapsed() >= Self::SLOW => drop(self.slow.fetch_max(1, Ordering::Relaxed)),
            Timer::Wall(_) => {}
            Timer::Thread(began) => self.took(thread_time().saturating_sub(*began)),
        }
    }

    fn took(&self, time: Duration) {
        if time >= Self::SLOW {
            if self.slow.fetch_add(1, Ordering::Relaxed) + 1 >= Self::IN_A_ROW {
                self.own_choices.store(Self::OWN_CHOICES, Ordering::Relaxed);
            }
        } else if self.slow.load(Ordering::Relaxed) > 0 {
            self.slow.store(0, Ordering::Relaxed);
        }
    }

    /// Whether Ringway chooses the port of this connect.
    pub fn is_crowded(&self) -> bool {
        // Store only while it is crowded: all workers share this cache line.
        self.own_choices.load(Ordering::Relaxed) > 0
            && self.own_choices.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

/// When a connect call began.
#[derive(Debug)]
pub enum Timer {
    /// By the monotonic clock.
    Wall(Instant),
    /// By the processor time of this thread.
    Thread(Duration),
}

/// The processor time that this thread has used.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // The kernel returns no negative time for this clock.
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_chosen_after_slow_searches_in_a_row_and_for_a_while() {
        let search = PortSearch::default();
        let (slow, quick) = (PortSearch::SLOW, PortSearch::SLOW / 2);
        for time in [slow, slow, quick, slow, slow] {
            search.took(time);
        }
        assert!(!search.is_crowded());
        search.took(slow);
        assert_eq!((0..2000).filter(|_| search.is_crowded()).count(), 1000);
        // One slow search shows that the kernel still needs long.
        search.took(slow);
        assert!(search.is_crowded());
    }

    #[test]
    fn calls_in_which_the_thread_waited_for_a_processor_are_no_searches() {
        let search = PortSearch::default();
        for _ in 0..5 {
            let timer = search.begin();
            std::thread::sleep(PortSearch::SLOW * 2);
            search.end(&timer);
        }
        assert!(!search.is_crowded());
    }
}
