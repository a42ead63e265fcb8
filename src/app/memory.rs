//! Checks that weights and KV pool fit into the memory available to this process (the machine's or the control group's). Pages
//! of the pool are allocated only when used, so without this check a pool that is too large would get the process killed later,
//! under load.

use crate::config::ComputeConfig;
use crate::engine::model_runner::CPU_KV_CACHE_MEMORY;
use crate::health::{HostMemory, MemoryLimit};

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    #[error(
        "kv_cache_memory of {}{} does not fit into the memory of {source_name}, which is {}: use {} at most",
        size(*.pool), beside(*.weights), size(*.limit), size(.limit - .weights)
    )]
    Pool { pool: u64, weights: u64, limit: u64, source_name: &'static str },
    #[error("the model's weights take {}, and the memory of {source_name} is {}", size(*.weights), size(*.limit))]
    Weights { weights: u64, limit: u64, source_name: &'static str },
}

/// The size of the KV pool in host memory, beside `weights` bytes of weights (0 while unknown). If `kv_cache_memory` is not
/// configured, the pool is limited to half of what the weights leave.
pub fn kv_pool(compute: &ComputeConfig, weights: u64, removal_mark: f64) -> Result<Option<u64>, MemoryError> {
    match HostMemory::detect().limit() {
        Ok(limit) => fit(compute.kv_cache_memory, weights, limit, removal_mark),
        Err(error) => {
            tracing::debug!(%error, "cannot determine the memory of this machine");
            Ok(compute.kv_cache_memory)
        }
    }
}

fn fit(
    asked: Option<u64>,
    weights: u64,
    MemoryLimit { bytes: limit, source_name }: MemoryLimit,
    removal_mark: f64,
) -> Result<Option<u64>, MemoryError> {
    if weights >= limit {
        return Err(MemoryError::Weights { weights, limit, source_name });
    }
    let left = limit - weights;
    let Some(pool) = asked else { return Ok((CPU_KV_CACHE_MEMORY > left / 2).then_some(left / 2)) };
    if pool > left {
        return Err(MemoryError::Pool { pool, weights, limit, source_name });
    }
    if (pool + weights) as f64 > removal_mark * limit as f64 {
        tracing::warn!(
            kv_cache_memory = pool,
            weights,
            limit,
            "when the KV pool is full, memory use will exceed memory_removal_mark ({removal_mark}) and the node will be unready"
        );
    }
    Ok(Some(pool))
}

fn beside(weights: u64) -> String {
    if weights == 0 { String::new() } else { format!(" beside {} of weights", size(weights)) }
}

/// Written in the largest unit that fits.
fn size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 30 => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        _ if bytes >= 1 << 20 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const LIMIT: MemoryLimit = MemoryLimit { bytes: 24 * GIB, source_name: "this machine" };

    #[test]
    fn a_pool_that_does_not_fit_is_refused_with_both_numbers() {
        let error = fit(Some(100 * GIB), 0, LIMIT, 0.95).unwrap_err().to_string();
        for part in ["kv_cache_memory of 100.0 GiB does not", "this machine, which is 24.0 GiB", "24.0 GiB at most"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let beside_weights = fit(Some(20 * GIB), 5 * GIB, LIMIT, 0.95).unwrap_err().to_string();
        for part in ["20.0 GiB beside 5.0 GiB of weights", "19.0 GiB at most"] {
            assert!(beside_weights.contains(part), "{part}: {beside_weights}");
        }
        assert_eq!(fit(Some(19 * GIB), 5 * GIB, LIMIT, 0.95), Ok(Some(19 * GIB)));
        let weights = fit(None, 30 * GIB, LIMIT, 0.95).unwrap_err().to_string();
        assert!(weights.contains("30.0 GiB") && weights.contains("24.0 GiB"), "{weights}");
    }

    #[test]
    fn a_pool_that_nobody_asked_for_is_made_to_fit() {
        assert_eq!(fit(None, GIB, LIMIT, 0.95), Ok(None), "there is room for the usual one");
        let small = MemoryLimit { bytes: GIB, source_name: "the control group" };
        assert_eq!(fit(None, GIB / 2, small, 0.95), Ok(Some(GIB / 4)));
    }
}
