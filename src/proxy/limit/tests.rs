use std::time::Duration;

use super::*;

fn limit(size: usize) -> Arc<Limit> {
    Arc::new(Limit::new(Some(size)))
}

fn open(limit: &Arc<Limit>) -> Vec<ConnectionPermit> {
    let all = Arc::new(Limit::new(None));
    std::iter::from_fn(|| ConnectionPermit::try_acquire(limit, &all)).take(100).collect()
}

#[test]
fn a_limit_grows_and_shrinks_while_permits_are_in_use() {
    let limit = limit(3);
    let mut taken = open(&limit);
    assert_eq!(taken.len(), 3);
    limit.resize(Some(5));
    taken.extend(open(&limit));
    assert_eq!((taken.len(), limit.size()), (5, 5));
    limit.resize(Some(2));
    taken.truncate(3);
    assert!(open(&limit).is_empty(), "three permits are in use under a limit of two");
    taken.clear();
    assert_eq!(open(&limit).len(), 2);
    limit.resize(None);
    assert_eq!(open(&limit).len(), 100);
    limit.resize(Some(1));
    assert_eq!(open(&limit).len(), 1);
}

#[test]
fn a_full_listener_takes_no_permit_of_the_process() {
    let (full, other, process) = (limit(0), limit(1), limit(1));
    assert!(ConnectionPermit::try_acquire(&full, &process).is_none());
    assert!(ConnectionPermit::try_acquire(&other, &process).is_some());
}

#[tokio::test]
async fn waiting_tasks_get_permits_in_the_order_of_their_arrival() {
    let limit = limit(1);
    let first = limit.take().await;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..5 {
        let (limit, order) = (Arc::clone(&limit), Arc::clone(&order));
        tasks.spawn(async move {
            let permit = limit.take().await;
            order.lock().unwrap().push(number);
            tokio::task::yield_now().await;
            drop(permit);
        });
        tokio::task::yield_now().await;
    }
    drop(first);
    // A task that arrives now waits behind the queue.
    let late = limit.take().await;
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4]);
    drop(late);
    tasks.join_all().await;
    assert_eq!(limit.waiting.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_task_that_gives_up_passes_its_turn_to_the_next() {
    let limit = limit(1);
    let held = limit.take().await;
    let mut impatient = Box::pin(limit.take());
    assert!(tokio::time::timeout(Duration::from_millis(1), &mut impatient).await.is_err());
    let other = Arc::clone(&limit);
    let patient = tokio::spawn(async move { drop(other.take().await) });
    tokio::task::yield_now().await;
    // Wakes the impatient one, which ends before it runs.
    drop(held);
    drop(impatient);
    tokio::time::timeout(Duration::from_secs(10), patient).await.unwrap().unwrap();
}

/// Threads take and return permits, give up waiting, and resize the limit, all at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_task_waits_while_there_is_room_and_the_limit_holds() {
    let limit = limit(3);
    let most = Arc::new(AtomicUsize::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..16_u32 {
        let (limit, most) = (Arc::clone(&limit), Arc::clone(&most));
        tasks.spawn(async move {
            for turn in 0..2000_u32 {
                if (task + turn) % 7 == 0 {
                    // Gives up at once if it must wait.
                    let _ = tokio::time::timeout(Duration::ZERO, limit.take()).await;
                    continue;
                }
                let permit = limit.take().await;
                most.fetch_max(limit.used.load(Ordering::SeqCst), Ordering::SeqCst);
                if (task + turn) % 3 == 0 {
                    tokio::task::yield_now().await;
                }
                drop(permit);
            }
        });
    }
    let resizer = Arc::clone(&limit);
    let resizing = tokio::spawn(async move {
        for size in (1..=5).cycle() {
            resizer.resize(Some(size));
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
    });
    tokio::time::timeout(Duration::from_secs(60), tasks.join_all()).await.expect("a task waits without end");
    resizing.abort();
    let most = most.load(Ordering::SeqCst);
    assert!((1..=5).contains(&most), "{most}");
    // With a size that stays, no more are ever in use.
    let _ = resizing.await;
    limit.resize(Some(2));
    let most = Arc::new(AtomicUsize::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (limit, most) = (Arc::clone(&limit), Arc::clone(&most));
        tasks.spawn(async move {
            for _ in 0..1000 {
                let permit = limit.take().await;
                most.fetch_max(limit.used.load(Ordering::SeqCst), Ordering::SeqCst);
                tokio::task::yield_now().await;
                drop(permit);
            }
        });
    }
    tokio::time::timeout(Duration::from_secs(60), tasks.join_all()).await.expect("a task waits without end");
    assert_eq!(most.load(Ordering::SeqCst), 2);
    assert_eq!((limit.used.load(Ordering::SeqCst), limit.waiting.load(Ordering::SeqCst)), (0, 0));
}
