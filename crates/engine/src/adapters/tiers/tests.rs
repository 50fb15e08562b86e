use super::*;

const KB: u64 = 1 << 10;

fn tiers(host: usize, device: usize) -> AdapterTiers {
    AdapterTiers::new(TierSizes::of_adapters(host, device), 2)
}

/// Carries out all orders at once. Every adapter has one kilobyte.
fn carry_out_all(tiers: &mut AdapterTiers) -> Vec<Order> {
    let mut done = Vec::new();
    loop {
        let orders = tiers.take_orders();
        if orders.is_empty() {
            return done;
        }
        for order in &orders {
            match *order {
                Order::Read(id) => tiers.loaded(id, Generation([id.0 as u8; 32]), KB).unwrap(),
                Order::Copy(id, _) => tiers.copied(id),
                Order::Drop(_) | Order::Clear(_) | Order::Forget(_) => (),
            }
        }
        done.extend(orders);
    }
}

fn bring(tiers: &mut AdapterTiers, ids: &[AdapterId]) {
    for _ in 0..2 * ids.len() {
        tiers.fetch(ids);
        carry_out_all(tiers);
    }
}

#[test]
fn an_adapter_goes_from_its_files_to_a_slot() {
    let (mut tiers, id) = (tiers(2, 1), AdapterId(1));
    tiers.lease(id);
    tiers.fetch(&[id]);
    assert_eq!(tiers.take_orders(), [Order::Read(id)]);
    assert!(tiers.ready(id).is_none());
    tiers.loaded(id, Generation([1; 32]), KB).unwrap();
    tiers.fetch(&[id]);
    assert_eq!(tiers.take_orders(), [Order::Copy(id, 0)]);
    tiers.copied(id);
    assert_eq!((tiers.ready(id), tiers.acquire(id)), (Some(Generation([1; 32])), Some(0)));
    let (host, device) = tiers.fill();
    assert_eq!((host.bytes(), device.bytes(), tiers.in_use()), (KB, KB, 1));
}

#[test]
fn the_least_recently_used_is_evicted_and_one_in_use_never() {
    let (mut tiers, [a, b, c]) = (tiers(2, 2), [1, 2, 3].map(AdapterId));
    [a, b, c].into_iter().for_each(|id| tiers.lease(id));
    bring(&mut tiers, &[a, b]);
    tiers.acquire(b).unwrap();
    tiers.acquire(a).unwrap();
    bring(&mut tiers, &[c]);
    assert_eq!(tiers.ready(c), None);
    assert!(tiers.residence(c).host, "it is read ahead while the slots are taken");
    tiers.release(a);
    tiers.release(b);
    bring(&mut tiers, &[c]);
    assert_eq!((tiers.ready(b), tiers.ready(a).is_some()), (None, true));
    assert_eq!(tiers.stats().device_evictions, 1);
}

#[test]
fn what_is_needed_earlier_is_not_evicted_for_what_is_needed_later() {
    let (mut tiers, [a, b]) = (tiers(1, 1), [1, 2].map(AdapterId));
    [a, b].into_iter().for_each(|id| tiers.lease(id));
    bring(&mut tiers, &[b]);
    bring(&mut tiers, &[a, b]);
    assert!(tiers.ready(a).is_some());
    bring(&mut tiers, &[a, b]);
    assert!(tiers.ready(a).is_some() && tiers.ready(b).is_none());
}

#[test]
fn one_that_never_fits_is_refused_with_the_knob() {
    let host = TierSize { adapters: None, bytes: Some(4 * KB) };
    let device = TierSize { adapters: Some(8), bytes: Some(2 * KB) };
    let mut tiers = AdapterTiers::new(TierSizes { host, device }, 1);
    let id = AdapterId(1);
    tiers.lease(id);
    for (kilobytes, tier, knob) in
        [(5, "host", "host_cache_size"), (3, "device", "device_cache_percent")]
    {
        tiers.fetch(&[id]);
        assert_eq!(tiers.take_orders(), [Order::Read(id)]);
        let error = tiers.loaded(id, Generation([1; 32]), kilobytes * KB).unwrap_err();
        assert_eq!((error.tier, error.bytes), (tier, kilobytes * KB));
        assert!(error.to_string().contains(knob), "{error}");
        tiers.entries.get_mut(&id).unwrap().content = None;
        tiers.take_orders();
    }
    assert_eq!(tiers.fill().0.adapters(), 0);
}

#[test]
fn one_pinned_by_the_user_stays_in_host_memory() {
    let (mut tiers, [a, b]) = (tiers(1, 2), [1, 2].map(AdapterId));
    tiers.set_pinned(a, true);
    tiers.loaded(a, Generation([1; 32]), KB).unwrap();
    tiers.lease(b);
    tiers.fetch(&[b]);
    assert_eq!(tiers.take_orders(), [Order::Read(b)], "its size decides whether it is refused");
    let error = tiers.loaded(b, Generation([2; 32]), KB).unwrap_err();
    assert!(error.to_string().contains("1 adapters are pinned"), "{error}");
    tiers.set_pinned(a, false);
    bring(&mut tiers, &[b]);
    assert!(tiers.ready(b).is_some());
}

#[test]
fn an_unloaded_adapter_goes_when_its_last_sequence_ends() {
    let (mut tiers, id) = (tiers(2, 1), AdapterId(1));
    tiers.lease(id);
    bring(&mut tiers, &[id]);
    tiers.acquire(id).unwrap();
    tiers.retire(id);
    assert!(tiers.ready(id).is_some() && tiers.take_orders().is_empty());
    tiers.release(id);
    tiers.unlease(id);
    assert_eq!(tiers.take_orders(), [Order::Clear(0), Order::Drop(id), Order::Forget(id)]);
    assert_eq!(tiers.residence(id), Residence::default());
}

#[test]
fn a_failed_copy_gives_its_slot_back() {
    let (mut tiers, id) = (tiers(1, 1), AdapterId(1));
    tiers.lease(id);
    tiers.fetch(&[id]);
    tiers.take_orders();
    tiers.loaded(id, Generation([1; 32]), KB).unwrap();
    tiers.fetch(&[id]);
    assert_eq!(tiers.take_orders(), [Order::Copy(id, 0)]);
    tiers.failed(id);
    assert_eq!(tiers.take_orders(), [Order::Clear(0)]);
    tiers.fetch(&[id]);
    assert_eq!(tiers.take_orders(), [Order::Copy(id, 0)]);
}
