//! Tests the emulated device: that it behaves like a device, and that it detects errors that a device would not report.

#![expect(unsafe_code, reason = "launching a kernel is unsafe")]
#![expect(clippy::unwrap_used, reason = "a test may fail without words")]

use half::{bf16, f16};
use outrigger_kernels::gpu::checks::{Random, near};
use outrigger_kernels::gpu::{
    Address, Device, DeviceBuffer, DeviceError, DeviceType, EmulatorOptions, Faults, HostBuffer, Launch, LaunchFault,
    TensorMap, TensorMapShape, ThreadOrder,
};

const ORDERS: [ThreadOrder; 3] = [ThreadOrder::Forward, ThreadOrder::Backward, ThreadOrder::Shuffled(3)];

fn device() -> Device {
    Device::emulator().expect("the feature is on")
}

fn ordered(order: ThreadOrder) -> Device {
    Device::emulator_with(EmulatorOptions { order, ..EmulatorOptions::default() }).expect("the feature is on")
}

fn poisoned<T: DeviceType>(device: &Device, len: usize) -> DeviceBuffer<T> {
    DeviceBuffer::new(device, len).expect("there is room")
}

fn upload<T: DeviceType>(device: &Device, values: &[T]) -> DeviceBuffer<T> {
    DeviceBuffer::from_slice(device, values).expect("there is room")
}

/// Launches one of the emulator's own kernels, whose parameters mirror `P`.
fn launch<P: Copy>(device: &Device, name: &'static str, launch: Launch, params: P) -> Result<(), DeviceError> {
    // SAFETY: the tests pass the kernels' own parameters, or want them refused.
    unsafe { device.launch(name, &launch, &params) }
}

fn message(result: Result<(), DeviceError>) -> String {
    match result {
        Err(DeviceError::Failed { message, .. }) => message,
        other => panic!("expected a failure, not {other:?}"),
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Scale {
    out: Address,
    input: Address,
    factor: f32,
    len: u32,
}

fn scale(device: &Device, out: &DeviceBuffer<f32>, input: &DeviceBuffer<f32>, factor: f32) -> Result<(), DeviceError> {
    let params = Scale { out: out.address(), input: input.address(), factor, len: input.len() as u32 };
    launch(device, "emulation_scale", Launch::new([input.len().div_ceil(256) as u32, 1, 1], 256), params)
}

#[test]
fn a_missing_barrier_shows_in_some_order() {
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Reverse {
        out: Address,
        input: Address,
        barrier: u32,
    }
    let input: Vec<u32> = (0..128).collect();
    let reversed: Vec<u32> = (0..128).rev().collect();
    let run = |order, barrier| {
        let device = ordered(order);
        let (out, input) = (poisoned::<u32>(&device, 128), upload(&device, &input));
        let params = Reverse { out: out.address(), input: input.address(), barrier };
        launch(&device, "emulation_reverse", Launch::new([1, 1, 1], 128), params).unwrap();
        out.to_vec().unwrap()
    };
    for order in ORDERS {
        assert_eq!(run(order, 1), reversed, "{order:?}");
        let raced = run(order, 0);
        assert_ne!(raced, reversed, "{order:?}");
        assert!(raced.contains(&u32::MAX), "what was read too early is poison");
    }
    assert_ne!(run(ThreadOrder::Forward, 0), run(ThreadOrder::Backward, 0), "the orders differ");
    assert_ne!(run(ThreadOrder::Shuffled(1), 0), run(ThreadOrder::Shuffled(2), 0), "the seeds differ");
}

#[test]
fn lanes_exchange_values() {
    for order in ORDERS {
        let device = ordered(order);
        let out = poisoned::<u32>(&device, 5 * 32);
        launch(&device, "emulation_warp", Launch::new([1, 1, 1], 32), out.address()).unwrap();
        let out = out.to_vec().unwrap();
        for lane in 0..32u32 {
            let at = |operation: usize| out[operation * 32 + lane as usize];
            assert_eq!(at(0), 100 + (lane ^ 5));
            assert_eq!(at(1), 100 + lane / 4);
            assert_eq!(at(2), 100 + if lane < 3 { lane } else { lane - 3 });
            assert_eq!(at(3), (0..32).filter(|lane| lane % 3 == 0).map(|lane| 1 << lane).sum::<u32>());
            assert_eq!(at(4), (100..132).sum::<u32>());
        }
    }
}

#[test]
fn named_barriers_hold_their_own_threads() {
    for order in ORDERS {
        let device = ordered(order);
        let out = poisoned::<u32>(&device, 128);
        launch(&device, "emulation_pairs", Launch::new([1, 1, 1], 128), out.address()).unwrap();
        assert_eq!(out.to_vec().unwrap(), (0..128).map(|thread| thread ^ 32).collect::<Vec<u32>>(), "{order:?}");
    }
}

#[test]
fn background_copies_are_done_when_waited_for() {
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Async {
        out: Address,
        input: Address,
        groups: u32,
    }
    let input: Vec<u32> = (1..=256).collect();
    let run = |groups| {
        let device = device();
        let (out, input) = (poisoned::<u32>(&device, 256), upload(&device, &input));
        let params = Async { out: out.address(), input: input.address(), groups };
        launch(&device, "emulation_async", Launch::new([1, 1, 1], 32).with_shared(1024), params).unwrap();
        out.to_vec().unwrap()
    };
    // Lane 7 copies nothing, and so gets zeros.
    let copied: Vec<u32> = (0..256).map(|i| if i % 128 / 4 == 7 { 0 } else { i + 1 }).collect();
    assert_eq!(run(2), copied);
    assert_eq!(run(0), vec![u32::MAX; 256], "nobody waited");
    let first = run(1);
    assert_eq!(first[..128], copied[..128], "the first group was waited for");
    assert_eq!(first[128..], [u32::MAX; 128], "the second was not");
}

#[test]
fn blocks_on_two_threads_count_right() {
    let options = EmulatorOptions { host_threads: 2, order: ThreadOrder::Shuffled(9), ..EmulatorOptions::default() };
    let device = Device::emulator_with(options).unwrap();
    let (count, largest) = (upload(&device, &[0u32]), upload(&device, &[0u64]));
    launch(&device, "emulation_count", Launch::new([500, 1, 1], 64), (count.address(), largest.address())).unwrap();
    assert_eq!(count.to_vec().unwrap(), [500 * 64]);
    assert_eq!(largest.to_vec().unwrap(), [500 * 64 - 1]);
}

/// Runs a kernel that does something wrong, and gives what is said about it.
fn misuse(fault: u32, index: u32) -> String {
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Misuse {
        out: Address,
        fault: u32,
        index: u32,
    }
    let device = device();
    let out = poisoned::<u32>(&device, 10);
    let shape = Launch::new([2, 1, 1], 64).with_shared(100);
    launch(&device, "emulation_misuse", shape, Misuse { out: out.address(), fault, index }).unwrap();
    let said = device.synchronize();
    assert!(said.is_err(), "fault {fault} at {index} goes unnoticed");
    assert_eq!(device.synchronize(), said, "a lost context stays lost");
    message(said)
}

#[test]
fn what_kernels_do_wrong_is_said() {
    let cases: &[(u32, u32, &[&str])] = &[
        (0, 0, &["emulation_misuse, block (0, 0, 0)", "5 to 5 have ended", "6 to 63 wait for the block's barrier"]),
        (1, 0, &["0 to 8 wait for warp_barrier", "9 to 9 wait for the block's barrier"]),
        (2, 0, &["thread (3, 0, 0)", "executes votes while others of its warp execute shuffle"]),
        (3, 10, &["0 bytes beyond an allocation of 40 bytes were written"]),
        (3, 20_000, &["thread (0, 0, 0): touches 0x", "bytes beyond the end of an allocation of 40"]),
        (4, 64, &["tests.cu:", "index 64 is beyond the array"]),
        (5, 2, &["tests.cu:", "is not aligned"]),
        (6, 101, &["writes 1 bytes beyond its 100 bytes of dynamic shared memory"]),
        (6, 1024, &["touches 0x"]),
        (7, 1, &["touches 0x"]),
        (8, 0, &["comes to barrier 1 for 32 threads while others wait there for 64"]),
        (9, 32, &["a shift by 32"]),
    ];
    for (fault, index, parts) in cases {
        let message = misuse(*fault, *index);
        for part in *parts {
            assert!(message.contains(part), "fault {fault}: {part:?} is not in {message:?}");
        }
    }
}

#[test]
fn launches_that_no_device_would_take_are_refused() {
    let device = device();
    let buffer = upload(&device, &[1.0f32; 8]);
    let params = Scale { out: buffer.address(), input: buffer.address(), factor: 2.0, len: 8 };
    let one = Launch::new([1, 1, 1], 256);
    assert!(message(launch(&device, "emulation_scale", one, [0u8; 20])).contains("has 20 bytes, the kernel takes 24"));
    let wide = Launch::new([1, 1, 1], 512);
    assert!(message(launch(&device, "emulation_scale", wide, params)).contains("512 threads"));
    assert!(message(launch(&device, "emulation_scale", one.with_shared(230 << 10), params)).contains("shared memory"));
    let tall = Launch::new([1, 65536, 1], 256);
    assert!(message(launch(&device, "emulation_scale", tall, params)).contains("grid"));
    let unknown = launch(&device, "no_such_kernel", one, params);
    assert_eq!(unknown, Err(DeviceError::UnknownKernel("no_such_kernel".to_owned())));
    device.synchronize().expect("a refused launch leaves the device as it was");
}

#[test]
fn an_overlapping_kernel_must_wait_for_the_one_before() {
    let device = device();
    let out = poisoned::<u32>(&device, 5 * 32);
    let overlapping = Launch { overlap: true, ..Launch::new([1, 1, 1], 32) };
    launch(&device, "emulation_warp", overlapping, out.address()).unwrap();
    assert!(message(device.synchronize()).contains("without grid_dependency_wait"));
}

#[test]
fn what_the_kernel_before_may_still_write_is_out_of_reach() {
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Early {
        out: Address,
        input: Address,
        reads_early: u32,
        writes_early: u32,
    }
    let overlapping = Launch { overlap: true, ..Launch::new([1, 1, 1], 32) };
    let run = |device: &Device, input: &DeviceBuffer<f32>, reads_early, writes_early| {
        let out = poisoned::<f32>(device, 1);
        let params = Early { out: out.address(), input: input.address(), reads_early, writes_early };
        launch(device, "emulation_early", overlapping, params).unwrap();
        out.to_vec().map(|out| out[0])
    };
    let produced = |device: &Device| {
        let (constant, product) = (upload(device, &[3.0f32]), poisoned::<f32>(device, 1));
        scale(device, &product, &constant, 2.0).unwrap();
        (constant, product)
    };
    for order in ORDERS {
        let device = ordered(order);
        let (constant, product) = produced(&device);
        assert_eq!(run(&device, &product, 0, 0), Ok(6.0), "it waits");
        scale(&device, &product, &constant, 3.0).unwrap();
        assert_eq!(run(&device, &constant, 1, 0), Ok(3.0), "no kernel writes it");
        scale(&device, &product, &constant, 4.0).unwrap();
        device.synchronize().unwrap();
        scale(&device, &poisoned(&device, 1), &constant, 5.0).unwrap();
        assert_eq!(run(&device, &product, 1, 0), Ok(12.0), "the host has waited");
        for (reads_early, writes_early) in [(1, 0), (0, 1)] {
            let device = ordered(order);
            let (_constant, product) = produced(&device);
            let said = message(run(&device, &product, reads_early, writes_early).map(drop));
            assert!(said.contains("before grid_dependency_wait"), "{said}");
        }
    }
}

#[test]
fn work_is_done_when_it_is_waited_for() {
    let device = device();
    let input = upload(&device, &[1.0f32, 2.0, 3.0]);
    let out = poisoned::<f32>(&device, 3);
    assert!(out.to_vec().unwrap().iter().all(|x| x.is_nan()), "fresh memory is poison");
    let mut host = HostBuffer::<f32>::zeroed(&device, 3).unwrap();
    let (before, after) = (device.driver().new_event().unwrap(), device.driver().new_event().unwrap());
    device.driver().record(before).unwrap();
    scale(&device, &out, &input, 2.0).unwrap();
    host.download(&out, 3).unwrap();
    device.driver().record(after).unwrap();
    assert!(host.iter().all(|x| x.is_nan()), "nothing is there before it is waited for");
    assert!(!device.driver().is_done(after).unwrap());
    assert!(device.driver().elapsed(before, after).is_err());
    device.driver().wait(after).unwrap();
    assert_eq!(*host, [2.0, 4.0, 6.0]);
    assert!(device.driver().is_done(after).unwrap());
    assert!(device.driver().elapsed(before, after).unwrap() >= 0.0);
}

#[test]
fn polling_an_event_comes_to_an_end() {
    let device = device();
    let input = upload(&device, &[1.0f32]);
    let out = poisoned::<f32>(&device, 1);
    scale(&device, &out, &input, 3.0).unwrap();
    let event = device.driver().new_event().unwrap();
    device.driver().record(event).unwrap();
    assert!(!device.driver().is_done(event).unwrap());
    assert!(device.driver().is_done(event).unwrap());
    assert_eq!(out.to_vec().unwrap(), [3.0]);
}

#[test]
fn page_locked_memory_is_read_when_the_upload_is_done() {
    let device = device();
    let mut host = HostBuffer::<f32>::zeroed(&device, 1).unwrap();
    let mut buffer = poisoned::<f32>(&device, 1);
    host[0] = 1.0;
    host.upload(&mut buffer, 1).unwrap();
    host[0] = 2.0;
    assert_eq!(buffer.to_vec().unwrap(), [2.0], "changed too early");
    let mut pageable = vec![3.0f32];
    buffer.upload(0, &pageable).unwrap();
    pageable[0] = 4.0;
    assert_eq!(buffer.to_vec().unwrap(), [3.0], "pageable memory may be changed at once");
}

#[test]
fn graphs_run_what_was_captured_with_the_memory_of_now() {
    let device = device();
    let driver = device.driver();
    let mut host = HostBuffer::<f32>::zeroed(&device, 2).unwrap();
    let mut result = HostBuffer::<f32>::zeroed(&device, 2).unwrap();
    let (mut input, out) = (upload(&device, &[0.0f32, 0.0]), poisoned::<f32>(&device, 2));
    driver.begin_capture().unwrap();
    host.upload(&mut input, 2).unwrap();
    scale(&device, &out, &input, 10.0).unwrap();
    result.download(&out, 2).unwrap();
    assert!(driver.synchronize().is_err(), "nothing is waited for in a capture");
    let graph = driver.end_capture().unwrap();
    assert!(out.to_vec().unwrap().iter().all(|x| x.is_nan()), "a captured kernel does not run");
    for round in [1.0f32, 2.0] {
        host.copy_from_slice(&[round, -round]);
        driver.launch_graph(graph).unwrap();
        assert!(result.iter().all(|x| x.is_nan()));
        driver.synchronize().unwrap();
        assert_eq!(*result, [10.0 * round, -10.0 * round]);
    }
    driver.drop_graph(graph);
    assert!(driver.end_capture().is_err(), "no capture is open");
}

#[test]
fn memory_is_counted_and_runs_out() {
    let options = EmulatorOptions { memory_bytes: 1 << 20, ..EmulatorOptions::default() };
    let device = Device::emulator_with(options).unwrap();
    let memory = || device.driver().memory().unwrap();
    assert_eq!((memory().free, memory().total), (1 << 20, 1 << 20));
    let half = DeviceBuffer::<u8>::new(&device, 1 << 19).unwrap();
    assert_eq!(memory().free, 1 << 19);
    let refused = DeviceBuffer::<u8>::new(&device, (1 << 19) + 1).err();
    assert_eq!(refused, Some(DeviceError::OutOfMemory { bytes: (1 << 19) + 1 }));
    drop(half);
    assert_eq!(memory().free, 1 << 20);
    assert_eq!(DeviceBuffer::<u8>::new(&device, 1).unwrap().address().0 % 256, 0);
}

#[test]
fn launches_fail_where_a_test_wants_it() {
    let faults = Faults::default();
    let options = EmulatorOptions { faults: faults.clone(), ..EmulatorOptions::default() };
    let device = Device::emulator_with(options).unwrap();
    let (input, out) = (upload(&device, &[1.0f32]), poisoned::<f32>(&device, 1));
    faults.fail_after(1, LaunchFault::OutOfMemory);
    scale(&device, &out, &input, 2.0).unwrap();
    assert!(matches!(scale(&device, &out, &input, 4.0), Err(DeviceError::OutOfMemory { .. })));
    assert_eq!(out.to_vec().unwrap(), [2.0]);
    scale(&device, &out, &input, 8.0).unwrap();
    assert_eq!(out.to_vec().unwrap(), [8.0], "the next one succeeds");
    faults.fail_after(0, LaunchFault::Failed);
    scale(&device, &out, &input, 16.0).expect("it is queued, and fails when it runs");
    assert!(device.synchronize().is_err());
    assert!(scale(&device, &out, &input, 32.0).is_err(), "the context is lost");
    assert!(device.driver().memory().is_err());
}

#[test]
fn capabilities_are_what_is_asked_for() {
    for (capability, shared) in [(80, 163 << 10), (89, 99 << 10), (90, 227 << 10)] {
        let device = Device::emulator_with(EmulatorOptions { capability, ..EmulatorOptions::default() }).unwrap();
        let properties = device.properties();
        assert_eq!((properties.capability, properties.shared_memory_per_block), (capability, shared));
    }
    assert!(Device::emulator_with(EmulatorOptions { capability: 75, ..EmulatorOptions::default() }).is_err());
}

/// A warp's product of random operands, against the same sums in f64.
fn check_product<T: DeviceType>(kind: u32, k: usize, narrow: fn(f32) -> T, wide: fn(T) -> f64) {
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Product {
        c: Address,
        a: Address,
        b: Address,
        kind: u32,
    }
    let device = device();
    let mut random = Random::new(u64::from(kind));
    let mut operand = |len| random.normals(len).into_iter().map(narrow).collect::<Vec<T>>();
    let (a, b) = (operand(16 * k), operand(8 * k));
    let start = random.normals(16 * 8);
    let (on_a, on_b, c) = (upload(&device, &a), upload(&device, &b), upload(&device, &start));
    let params = Product { c: c.address(), a: on_a.address(), b: on_b.address(), kind };
    launch(&device, "emulation_product", Launch::new([1, 1, 1], 32), params).unwrap();
    let expected: Vec<f32> = (0..16 * 8)
        .map(|i| {
            let (row, col) = (i / 8, i % 8);
            let dot: f64 = (0..k).map(|k_at| wide(a[row * k + k_at]) * wide(b[col * k + k_at])).sum();
            (f64::from(start[i]) + dot) as f32
        })
        .collect();
    near("product", &c.to_vec().unwrap(), &expected, 1e-7).unwrap();
}

/// A byte of four exponent and three mantissa bits: enough of them for a product of small numbers.
fn fp8_value(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
    let magnitude = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

#[test]
fn products_of_floats_are_plain_products() {
    check_product::<bf16>(0, 16, bf16::from_f32, f64::from);
    check_product::<f16>(1, 16, f16::from_f32, f64::from);
    // Any bits below NaN are a number; a normal one's leading bits serve.
    check_product::<u8>(2, 32, |x| (x.to_bits() >> 16 & 0xf7) as u8, fp8_value);
}

#[test]
fn products_of_bytes_are_exact() {
    let device = device();
    let mut random = Random::new(5);
    let mut bytes = |len: usize| random.bytes(len).into_iter().map(|byte| byte as i8).collect::<Vec<i8>>();
    let (a, b) = (bytes(16 * 32), bytes(8 * 32));
    let start: Vec<i32> = (0..16 * 8).map(|i| i * 1000 - 50_000).collect();
    let (on_a, on_b, c) = (upload(&device, &a), upload(&device, &b), upload(&device, &start));
    let params = (c.address(), on_a.address(), on_b.address(), 3u64);
    launch(&device, "emulation_product", Launch::new([1, 1, 1], 32), params).unwrap();
    let dot = |row: usize, col: usize| -> i32 {
        (0..32).map(|k| i32::from(a[row * 32 + k]) * i32::from(b[col * 32 + k])).sum()
    };
    let expected: Vec<i32> = (0..16 * 8).map(|i| start[i] + dot(i / 8, i % 8)).collect();
    assert_eq!(c.to_vec().unwrap(), expected);
}

#[test]
fn matrices_load_as_fragments() {
    let device = device();
    let elements: Vec<u16> = (0..32 * 8).collect();
    let (input, out) = (upload(&device, &elements), poisoned::<u32>(&device, 2 * 4 * 32));
    launch(&device, "emulation_load_matrix", Launch::new([1, 1, 1], 32), (out.address(), input.address())).unwrap();
    let out = out.to_vec().unwrap();
    let element = |matrix: usize, row: usize, col: usize| u32::from(elements[(matrix * 8 + row) * 8 + col]);
    for (matrix, lane) in (0..4).flat_map(|matrix| (0..32).map(move |lane| (matrix, lane))) {
        let (g, t) = (lane / 4, lane % 4);
        let plain = element(matrix, g, 2 * t) | element(matrix, g, 2 * t + 1) << 16;
        let transposed = element(matrix, 2 * t, g) | element(matrix, 2 * t + 1, g) << 16;
        assert_eq!((out[matrix * 32 + lane], out[(4 + matrix) * 32 + lane]), (plain, transposed));
    }
}

/// c[64, 16] = a · b^T by Hopper's copies and products, with one of the waits left out; and what it should be.
fn tiles(order: ThreadOrder, fault: u32) -> (Result<Vec<f32>, DeviceError>, Vec<f32>) {
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Tiles {
        a: TensorMap,
        b: TensorMap,
        c: Address,
        k: u32,
        fault: u32,
        padding: [u32; 12],
    }
    // Rows end within a tile, and b has fewer than its box: zeros stand in for the rest.
    let (m, n, k, stride) = (64, 13, 300, 304);
    let device = ordered(order);
    let mut random = Random::new(11);
    let mut matrix = |rows: usize| random.normals(rows * stride).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let (a, b) = (matrix(m), matrix(n));
    let (on_a, on_b, c) = (upload(&device, &a), upload(&device, &b), poisoned::<f32>(&device, 64 * 16));
    let map = |buffer: &DeviceBuffer<bf16>, rows: usize, box_rows| {
        let (rows, row_stride_bytes) = (rows as u64, 2 * stride as u64);
        let shape = TensorMapShape {
            address: buffer.address(),
            element_bytes: 2,
            rows,
            cols: k as u64,
            row_stride_bytes,
            box_rows,
            box_cols: 64,
        };
        device.driver().tensor_map(&shape).unwrap()
    };
    let (map_a, map_b) = (map(&on_a, m, 64), map(&on_b, n, 16));
    let params = Tiles { a: map_a, b: map_b, c: c.address(), k: k as u32, fault, padding: [0; 12] };
    let shape = Launch::new([1, 1, 1], 128).with_shared(2 * 80 * 128);
    launch(&device, "emulation_tiles", shape, params).unwrap();
    let dot = |row: usize, col: usize| -> f32 {
        let products = (0..k).map(|at| f64::from(a[row * stride + at]) * f64::from(b[col * stride + at]));
        products.sum::<f64>() as f32
    };
    let expected = (0..64 * 16).map(|i| if i % 16 < n { dot(i / 16, i % 16) } else { 0.0 }).collect();
    (c.to_vec(), expected)
}

#[test]
fn tiles_are_copied_and_multiplied() {
    for order in ORDERS {
        let (out, expected) = tiles(order, 0);
        near("tiles", &out.unwrap(), &expected, 1e-6).unwrap();
    }
}

#[test]
fn a_wait_left_out_of_a_pipeline_shows() {
    let wrong = |fault| {
        let mut outcomes = ORDERS.map(|order| tiles(order, fault)).into_iter();
        outcomes.any(|(out, expected)| out.map_or(true, |out| near("tiles", &out, &expected, 1e-6).is_err()))
    };
    assert!(!wrong(0));
    for fault in 1..=6 {
        assert!(wrong(fault), "fault {fault} goes unnoticed");
    }
    let said =
        |fault| ORDERS.map(|order| tiles(order, fault).0.err().map(|error| error.to_string()).unwrap_or_default());
    assert!(said(1).iter().any(|text| text.contains("nobody has initialized")));
    assert!(said(2).iter().all(|text| text.contains("more than it expects")));
    assert!(said(4).iter().all(|text| text.contains("without wgmma_fence")));
}
