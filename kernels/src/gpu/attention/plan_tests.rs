//! Checks that a plan covers everything once and within its limits, and that the blocks of the grid have even shares.

use proptest::prelude::*;

use super::*;
use crate::gpu::Properties;

fn hopper() -> Properties {
    Properties {
        name: "H100".to_owned(),
        capability: 90,
        multiprocessors: 132,
        shared_memory_per_block: 227 << 10,
        l2_bytes: 50 << 20,
        memory_bytes: 80 << 30,
        pci_bus_id: String::new(),
    }
}

fn plan(num_heads: usize, num_kv_heads: usize, window: Option<usize>, max_entries: usize) -> AttentionPlan {
    let kv = KvShape { num_layers: 1, num_blocks: 1, block_size: 64, num_kv_heads, head_dim: 128 };
    let shape = QueryShape { num_heads, sliding_window: window, soft_cap: None, scale: 0.1 };
    let geometry = Geometry::new(&hopper(), &kv, GpuKvType::BF16, &shape).unwrap();
    let limits = AttentionLimits { max_rows: 1 << 16, max_entries };
    AttentionPlan::of_geometry(geometry, kv, GpuKvType::BF16, shape, limits)
}

/// Entries of (start, tokens), one after the other in the batch, all with the one block of the pool.
fn run(plan: &mut AttentionPlan, sequences: &[(u32, u32)]) -> Vec<AttentionEntry> {
    let mut first_row = 0;
    let entries: Vec<AttentionEntry> = sequences
        .iter()
        .map(|&(start, num_tokens)| {
            first_row += num_tokens;
            AttentionEntry { first_row: first_row - num_tokens, num_tokens, start, table_offset: 0 }
        })
        .collect();
    plan.plan(&entries, &[0; 4096]);
    entries
}

/// The items of each block of the grid, as the kernel finds them.
fn shares(plan: &AttentionPlan) -> Vec<Vec<[u32; ITEM_WORDS]>> {
    let offsets = &plan.words[..=plan.geometry.split_blocks as usize];
    let items = plan.words[plan.first_item() as usize..].as_chunks::<ITEM_WORDS>().0;
    assert!(offsets[0] == 0 && *offsets.last().unwrap() as usize == plan.items.len(), "every item has a block");
    offsets.windows(2).map(|pair| items[pair[0] as usize..pair[1] as usize].to_vec()).collect()
}

#[test]
fn an_h100_keeps_two_blocks_of_a_large_model_on_a_multiprocessor() {
    let plan = plan(32, 8, None, 1);
    assert_eq!(plan.geometry.split_blocks, 264);
    assert_eq!((plan.geometry.split_stages, plan.geometry.tile_warps, plan.geometry.tile_stages), (3, 4, 2));
}

#[test]
fn every_device_that_is_built_for_can_run_every_head() {
    for (shared_kib, head_dim) in
        [99, 163, 227].into_iter().flat_map(|kib| [16, 64, 80, 128, 192, 256].map(|d| (kib, d)))
    {
        let kv = KvShape { num_layers: 1, num_blocks: 1, block_size: 16, num_kv_heads: 2, head_dim };
        let shape = QueryShape { num_heads: 4, sliding_window: None, soft_cap: None, scale: 0.1 };
        let properties = Properties { shared_memory_per_block: shared_kib << 10, ..hopper() };
        for ty in [GpuKvType::BF16, GpuKvType::F16, GpuKvType::Fp8] {
            let geometry = Geometry::new(&properties, &kv, ty, &shape).unwrap();
            assert!(
                geometry.split_shared_bytes() <= shared_kib << 10 && geometry.tile_shared_bytes() <= shared_kib << 10
            );
        }
    }
}

#[test]
fn shapes_that_no_kernel_takes_are_refused() {
    let kv = KvShape { num_layers: 1, num_blocks: 1, block_size: 16, num_kv_heads: 2, head_dim: 64 };
    let shape = QueryShape { num_heads: 4, sliding_window: None, soft_cap: None, scale: 0.1 };
    let refused = |kv: KvShape, shape: QueryShape| Geometry::new(&hopper(), &kv, GpuKvType::BF16, &shape).unwrap_err();
    assert_eq!(refused(KvShape { head_dim: 72, ..kv }, shape), UnsupportedAttention::HeadDim(72));
    assert_eq!(refused(KvShape { head_dim: 272, ..kv }, shape), UnsupportedAttention::HeadDim(272));
    assert_eq!(refused(KvShape { block_size: 48, ..kv }, shape), UnsupportedAttention::BlockSize(48));
    let heads = UnsupportedAttention::Heads { num_heads: 5, num_kv_heads: 2 };
    assert_eq!(refused(kv, QueryShape { num_heads: 5, ..shape }), heads);
}

#[test]
fn equal_sequences_are_not_split_and_fill_the_grid() {
    let mut plan = plan(32, 8, None, 256);
    run(&mut plan, &[(700, 1); 256]);
    assert_eq!(plan.items.len(), 256 * 8);
    assert!(plan.items.iter().all(|item| item.partial == WHOLE));
    assert!(shares(&plan).iter().all(|share| (7..=8).contains(&share.len())));
}

#[test]
fn a_long_sequence_is_spread_over_the_grid() {
    let mut plan = plan(32, 8, None, 256);
    run(&mut plan, &[(8191, 1)]);
    assert_eq!(plan.items.len(), 8 * 32);
    assert!(shares(&plan).iter().all(|share| share.len() <= 1));
}

#[test]
#[should_panic(expected = "a block beyond the pool")]
fn a_table_beyond_the_pool_is_refused() {
    plan(32, 8, None, 1).plan(&[AttentionEntry { first_row: 0, num_tokens: 1, start: 0, table_offset: 0 }], &[1]);
}

#[test]
fn tables_may_stand_behind_other_words() {
    let mut plan = plan(32, 8, None, 3);
    // One of few rows and one of many; the second's table begins at the first's end.
    let few = AttentionEntry { first_row: 0, num_tokens: 1, start: 700, table_offset: 0 };
    let many = AttentionEntry { first_row: 1, num_tokens: 300, start: 0, table_offset: 11 };
    let entries = [few, many];
    plan.plan(&entries, &[0; 16]);
    let (words, len, first) = (plan.words().to_vec(), plan.table_len(), plan.first_item() as usize);
    plan.place_tables(1000);
    assert_eq!((len, plan.table_len(), &plan.words()[..first]), (16, 1016, &words[..first]));
    let items = |words: &[u32]| words[first..].as_chunks::<ITEM_WORDS>().0.to_vec();
    assert!(plan.num_tiles() > 0 && items(&words).len() > plan.num_tiles() as usize);
    for (before, after) in items(&words).iter().zip(items(plan.words())) {
        let mut expected = *before;
        expected[4] += 1000;
        assert_eq!(after, expected);
    }
}

#[test]
#[should_panic(expected = "end before")]
fn a_short_table_is_refused() {
    plan(32, 8, None, 1).plan(&[AttentionEntry { first_row: 0, num_tokens: 1, start: 64, table_offset: 0 }], &[0]);
}

proptest! {
    #[test]
    fn every_row_meets_every_stretch_once(
        sequences in prop::collection::vec((0u32..20_000, prop_oneof![Just(1u32), 1u32..9, 1u32..100]), 1..10),
        group in 1usize..20,
        num_kv_heads in 1usize..5,
        window in prop::option::of(1usize..5000),
    ) {
        let mut plan = plan(group * num_kv_heads, num_kv_heads, window, 10);
        let entries = run(&mut plan, &sequences);
        let shares = shares(&plan);
        // The stretches that each row of a KV head meets, by the row of the batch where its entry begins.
        let mut met = std::collections::HashMap::<(u32, u32, u32), Vec<Range<u32>>>::new();
        let tiles: Vec<Item> = (0..num_kv_heads as u32)
            .flat_map(|kv_head| plan.tiles.iter().map(move |tile| Item { kv_head, ..*tile }))
            .collect();
        for item in plan.items.iter().chain(&tiles) {
            for row in item.tile_row..item.tile_row + item.rows {
                met.entry((item.kv_head, item.first_row, row)).or_default().push(item.first_stretch..item.end_stretch);
            }
        }
        for entry in &entries {
            for row in 0..entry.num_tokens * group as u32 {
                let position = (entry.start + row / group as u32) as usize;
                let needed = visible(position, position, window);
                for kv_head in 0..num_kv_heads as u32 {
                    let ranges = met.remove(&(kv_head, entry.first_row, row)).unwrap_or_default();
                    prop_assert!(!ranges.is_empty(), "row {row} of {entry:?} meets nothing");
                    prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{ranges:?}");
                    let whole = ranges[0].start as usize..ranges[ranges.len() - 1].end as usize;
                    prop_assert!(whole.start <= needed.start && needed.end <= whole.end, "{whole:?} of {needed:?}");
                }
            }
        }
        prop_assert!(met.is_empty(), "rows that no entry has");
        // Partials lie apart and within the workspace, counters too.
        let mut places = std::collections::HashSet::new();
        for item in plan.items.iter().filter(|item| item.partial != WHOLE) {
            prop_assert!(item.split < item.splits && (item.counter as usize) < MAX_SPLITS);
            prop_assert_eq!(item.first_stretch / 4, (item.end_stretch - 1) / 4, "an item of one split");
            for row in 0..item.rows {
                let place = item.partial + item.split * item.rows + row;
                prop_assert!((place as usize) < partial_rows(128) && places.insert(place));
            }
        }
        // No block has more than its share and the longest item.
        let cost = |item: &[u32; ITEM_WORDS]| item[7] - item[6] + 1;
        let loads: Vec<u32> = shares.iter().map(|share| share.iter().map(cost).sum()).collect();
        let (total, longest) = (loads.iter().sum::<u32>(), shares.iter().flatten().map(cost).max().unwrap_or(0));
        prop_assert!(loads.iter().all(|load| *load <= total / 264 + 1 + longest));
    }
}
