//! Rendezvous hashing (Thaler and Ravishankar, 1998): assigns nodes to a key without a shared list.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::types::{JournalKey, NodeId};

/// The nodes in their order for this key. Nodes that know the same nodes compute the same order, and it changes little when a
/// node comes or goes.
pub fn rank<'a>(key: &JournalKey, nodes: impl Iterator<Item = &'a NodeId>) -> Vec<&'a NodeId> {
    let seed = xxh3_64_with_seed(key.bytes(), 0);
    let mut ranked: Vec<(u64, &NodeId)> =
        nodes.map(|node| (xxh3_64_with_seed(node.as_str().as_bytes(), seed), node)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.into_iter().map(|(_, node)| node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Tenant;

    #[test]
    fn the_order_depends_on_the_key_and_survives_a_loss() {
        let nodes: Vec<NodeId> = (0..5).map(|index| NodeId::new(format!("node-{index}"))).collect();
        let mut first = [0; 5];
        for number in 0..1000 {
            let key = JournalKey::new(&Tenant::new("tenant"), &number.to_string(), 0);
            let ranked = rank(&key, nodes.iter());
            assert_eq!(ranked, rank(&key, nodes.iter().rev()));
            first[nodes.iter().position(|node| node == ranked[0]).expect("one of them")] += 1;
            let without: Vec<&NodeId> = ranked.iter().copied().filter(|node| **node != nodes[2]).collect();
            assert_eq!(rank(&key, nodes.iter().filter(|node| **node != nodes[2])), without);
        }
        assert!(first.iter().all(|&count| count > 140), "{first:?}");
    }
}
