//! Chooses the replica for a request: a pure function of the nodes' reports, their ages, what this node has sent since, and one
//! random number. Equal inputs give equal results.
//!
//! Candidates are first narrowed to the best class that is not empty (ready before saturated, in time before late, at pace
//! before slow, a free seat before a queue, this zone before others); then the strategy chooses among them. So a usable replica
//! is refused only because of its queue limits, however little it is preferred.

use std::time::Duration;

use super::config::Strategy;
use super::hot_prefixes::matched_tokens;
use super::retry_budget::unit;
use crate::cluster::LoadReport;
use crate::types::{NodeReason, NodeState, ReportedReason};

/// Nodes with older reports are not used for new requests.
pub const MAX_REPORT_AGE: Duration = Duration::from_secs(15);
/// A report of this age has half its weight.
const REPORT_HALF_LIFE: Duration = Duration::from_secs(3);

/// The minimum factor that a single problem leaves of a weight.
const LEAST_FACTOR: f64 = 0.05;
/// The factor for `Degraded`.
const DEGRADED: f64 = 0.3;

/// If a peer has at least this many more prompt tokens cached than this node, a hop pays off.
const WORTH_A_HOP: usize = 512;
/// Weight of a candidate that has the whole prompt cached, relative to one that has none of it.
const WHOLE_PREFIX: f64 = 4.0;

/// Limits of the retry time for a request that no node accepts.
const MIN_RETRY_AFTER: Duration = Duration::from_secs(1);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// What placement needs to know about a request.
#[derive(Clone, Copy, Debug)]
pub struct PlacementRequest<'a> {
    /// Tokens to compute before the first new one: the prompt and the tokens so far.
    pub prompt_tokens: u64,
    /// Choices to generate, each of which needs a seat; at least 1.
    pub choices: u32,
    /// Hashes of the prompt's beginnings (`hot_prefixes::hashes`).
    pub prefix_hashes: &'a [u32],
    /// Time left until the deadline.
    pub remaining: Option<Duration>,
    /// Continues a stream that has begun, so queue limits do not apply.
    pub is_continuation: bool,
}

/// A replica that could serve the request: this node, or a peer.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub report: &'a LoadReport,
    /// Age of the report; zero for this node.
    pub age: Duration,
    /// Whether this is the node itself.
    pub is_here: bool,
    /// Also true for the node itself.
    pub is_same_zone: bool,
    /// Choices and prompt tokens that this node has sent there and that the report cannot include yet.
    pub sent_choices: u32,
    pub sent_tokens: u64,
    /// From breaker and stability, 0 to 1.
    pub weight: f64,
    /// What its memory pressure leaves of its share, 0 to 1.
    pub memory_share: f64,
    /// If it is slow: how many times as long as its siblings it takes for equal work.
    pub slowness: Option<f64>,
    /// Nothing has been heard from it for a while, although something was expected.
    pub is_silent: bool,
    /// The breaker allows a call, and the stream has not failed there before.
    pub may_serve: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The index of the candidate.
    Serve(usize),
    /// All replicas that could serve it are above their queue limits.
    Shed { retry_after: Duration },
    /// No replica could serve it, even if idle.
    Nowhere,
}

/// Chooses a candidate. `random` breaks ties, and is the draw of strategies that draw.
pub fn place(
    strategy: Strategy,
    request: &PlacementRequest<'_>,
    candidates: &[Candidate<'_>],
    random: u64,
) -> Placement {
    let usable: Vec<RatedCandidate> = (candidates.iter().enumerate())
        .filter(|(_, candidate)| is_usable(candidate, request.is_continuation))
        .map(|(index, candidate)| RatedCandidate::new(index, candidate, request))
        .collect();
    if usable.is_empty() {
        return Placement::Nowhere;
    }
    let mut pool = usable.clone();
    pool.retain(|rated| request.is_continuation || !rated.is_full);
    if pool.is_empty() {
        return Placement::Shed { retry_after: retry_after(&usable) };
    }
    narrow(&mut pool, |rated| rated.is_known);
    narrow(&mut pool, |rated| !rated.is_silent);
    narrow(&mut pool, |rated| rated.is_ready);
    let remaining = request.remaining.map_or(f64::INFINITY, |remaining| remaining.as_secs_f64());
    narrow(&mut pool, |rated| rated.wait < remaining);
    narrow(&mut pool, |rated| rated.has_budget);
    leave_out_slow_ones(&mut pool);
    if strategy == Strategy::PrefixCache {
        narrow_to_longest_prefix(&mut pool);
    }
    narrow(&mut pool, |rated| rated.has_seats);
    if strategy == Strategy::Balanced
        && let Some(here) = here_if_well(&pool)
    {
        return Placement::Serve(here.index);
    }
    narrow(&mut pool, |rated| rated.is_same_zone);
    Placement::Serve(choose(strategy, &pool, random).index)
}

/// Whether the candidate could serve the request if it were idle.
fn is_usable(candidate: &Candidate<'_>, is_continuation: bool) -> bool {
    let report = candidate.report;
    let is_up = match report.state {
        NodeState::Ready | NodeState::Degraded => report.ready || is_unready_by_queue(report),
        NodeState::Starting | NodeState::Warming | NodeState::Draining | NodeState::Stopped | NodeState::Failed => {
            false
        }
    };
    // A stream that has begun may try any node that membership considers alive.
    let is_known = is_continuation || candidate.age <= MAX_REPORT_AGE;
    is_up && is_known && candidate.may_serve
}

/// Whether only its full queue makes it unready: it works, but others should be asked first.
fn is_unready_by_queue(report: &LoadReport) -> bool {
    const FULL: ReportedReason = ReportedReason::Known(NodeReason::QueueFull);
    let degrades = |reason: &ReportedReason| matches!(reason, ReportedReason::Known(NodeReason::Degraded(_)));
    report.reasons.contains(&FULL) && report.reasons.iter().all(|reason| *reason == FULL || degrades(reason))
}

/// A usable candidate, evaluated for this request.
#[derive(Clone, Copy, Debug)]
struct RatedCandidate {
    index: usize,
    is_here: bool,
    is_same_zone: bool,
    /// The report is recent enough.
    is_known: bool,
    is_ready: bool,
    is_full: bool,
    /// All choices can start at once.
    has_seats: bool,
    /// The prompt fits into the queue.
    has_budget: bool,
    seats: f64,
    /// Choices there: running, waiting and on their way.
    occupied: f64,
    choices: f64,
    /// Prompt tokens that wait or are on their way.
    backlog: f64,
    /// Seconds until the backlog is processed; 0 with a free seat, or if nothing was measured.
    wait: f64,
    kv_usage: f64,
    /// Seconds to the first token and between tokens; 0 until measured.
    first_token: f64,
    inter_token: f64,
    drain: f64,
    /// Tokens of the prompt that are probably in its cache, and their fraction of the prompt.
    matched_tokens: usize,
    matched_part: f64,
    is_slow: bool,
    is_silent: bool,
    /// The fraction of its normal share that it gets, above 0 and at most 1.
    health: f64,
}

impl RatedCandidate {
    fn new(index: usize, candidate: &Candidate<'_>, request: &PlacementRequest<'_>) -> Self {
        let report = candidate.report;
        let (seats, choices) = (f64::from(report.seats), f64::from(request.choices));
        let occupied = f64::from(report.running) + f64::from(report.waiting) + f64::from(candidate.sent_choices);
        let has_seats = occupied == 0.0 || occupied + choices <= seats;
        let backlog = report.waiting_tokens.saturating_add(candidate.sent_tokens);
        let drain = sane(report.drain_tokens_per_second);
        let wait = if has_seats || drain == 0.0 { 0.0 } else { backlog as f64 / drain };
        let needed = candidate.sent_tokens.saturating_add(request.prompt_tokens);
        let matched_tokens = matched_tokens(request.prefix_hashes, &report.hot_prefixes);
        Self {
            index,
            is_here: candidate.is_here,
            is_same_zone: candidate.is_same_zone,
            is_known: candidate.age <= MAX_REPORT_AGE,
            is_ready: report.ready,
            is_full: occupied >= seats && projected_saturation(candidate) >= 1.0,
            has_seats,
            // A prompt larger than the whole queue is accepted if no other waits.
            has_budget: backlog == 0 || needed <= report.free_token_budget,
            seats: seats.max(1.0),
            occupied,
            choices,
            backlog: backlog as f64,
            wait,
            kv_usage: sane(report.kv_usage).min(1.0),
            first_token: sane(report.time_to_first_token),
            inter_token: sane(report.inter_token_latency),
            drain,
            matched_tokens,
            matched_part: (matched_tokens as f64 / request.prompt_tokens.max(1) as f64).min(1.0),
            is_slow: candidate.slowness.is_some(),
            is_silent: candidate.is_silent,
            health: health(candidate),
        }
    }

    /// The value that `least-request` compares: occupied seats, weighted by the candidate's share.
    fn crowd(&self) -> f64 {
        (self.occupied + self.choices) / self.health
    }

    /// Seconds for a reply of typical length, including the effect of requests on their way.
    fn reply_time(&self) -> f64 {
        const ORDINARY_TOKENS: f64 = 100.0;
        (self.first_token + ORDINARY_TOKENS * self.inter_token) * (1.0 + self.occupied / self.seats)
    }

    /// The weight for the draw of `balanced`. `pace` is the best reply time in the pool.
    fn balanced_weight(&self, pace: f64) -> f64 {
        let room = match self.has_seats {
            true => (self.seats - self.occupied) / self.seats,
            false => 1.0 / (1.0 + self.wait + self.occupied / self.seats),
        };
        let factors = [room, 1.0 - self.kv_usage, self.relative_speed(pace)];
        let comfort: f64 = factors.into_iter().map(|factor| factor.max(LEAST_FACTOR)).product();
        self.health * comfort * (1.0 + (WHOLE_PREFIX - 1.0) * self.matched_part)
    }

    /// 1 for the fastest, and for one that has not been measured.
    fn relative_speed(&self, pace: f64) -> f64 {
        let own = self.reply_time();
        if own > 0.0 && pace > 0.0 { (pace / own).min(1.0) } else { 1.0 }
    }
}

/// How full the queue will be with the requests on their way that find no seat.
fn projected_saturation(candidate: &Candidate<'_>) -> f64 {
    let report = candidate.report;
    let reported = sane(report.queue_saturation);
    let free_seats = report.seats.saturating_sub(report.running.saturating_add(report.waiting));
    let queued = candidate.sent_choices.saturating_sub(free_seats);
    if queued == 0 {
        return reported;
    }
    // The report contains no limits, only how full the queue is with what waits.
    let by_requests = match report.waiting {
        0 => 0.0,
        waiting => reported * (1.0 + f64::from(queued) / f64::from(waiting)),
    };
    let capacity = report.waiting_tokens.saturating_add(report.free_token_budget);
    let backlog = report.waiting_tokens.saturating_add(candidate.sent_tokens);
    let by_tokens = if capacity == 0 { 0.0 } else { backlog as f64 / capacity as f64 };
    reported.max(by_requests).max(by_tokens)
}

/// The factor that slowness leaves of a weight.
pub fn pace_weight(slowness: Option<f64>) -> f64 {
    slowness.map_or(1.0, |slowness| (1.0 / slowness.max(1.0)).max(LEAST_FACTOR))
}

fn health(candidate: &Candidate<'_>) -> f64 {
    let report = candidate.report;
    let by_state = if report.state == NodeState::Degraded { DEGRADED } else { 1.0 };
    let by_age = libm::exp2(-candidate.age.as_secs_f64() / REPORT_HALF_LIFE.as_secs_f64());
    let fraction = |value: f64| if value.is_finite() { value.min(1.0) } else { 0.0 };
    let (by_memory, given) = (fraction(candidate.memory_share), fraction(candidate.weight));
    [by_state, by_age, by_memory, pace_weight(candidate.slowness), given]
        .into_iter()
        .map(|factor| factor.max(LEAST_FACTOR))
        .product()
}

/// Keeps the replicas at normal pace, and slow ones with a free seat that would finish before the shortest queue of the others.
fn leave_out_slow_ones(pool: &mut Vec<RatedCandidate>) {
    let at_pace = pool.iter().filter(|rated| !rated.is_slow);
    let soonest = at_pace.map(|rated| rated.wait + rated.reply_time()).fold(f64::INFINITY, f64::min);
    if soonest.is_finite() {
        pool.retain(|rated| !rated.is_slow || (rated.has_seats && rated.reply_time() < soonest));
    }
}

/// This node, if it is healthy and has a free seat, unless a peer has much more of the prompt cached.
fn here_if_well(pool: &[RatedCandidate]) -> Option<&RatedCandidate> {
    let here = pool.iter().find(|rated| rated.is_here && rated.has_seats)?;
    let is_well = here.is_ready && here.health >= 0.5 && here.relative_speed(pace(pool)) >= 0.5;
    let longest = pool.iter().map(|rated| rated.matched_tokens).max().unwrap_or(0);
    (is_well && longest < here.matched_tokens + WORTH_A_HOP).then_some(here)
}

/// The best measured reply time; 0 if nothing was measured.
fn pace(pool: &[RatedCandidate]) -> f64 {
    let measured = pool.iter().map(RatedCandidate::reply_time).filter(|time| *time > 0.0);
    measured.min_by(f64::total_cmp).unwrap_or(0.0)
}

/// Keeps the candidates that have most of the prompt cached, unless none has any, or their seats are occupied twice over.
fn narrow_to_longest_prefix(pool: &mut Vec<RatedCandidate>) {
    let is_bearable = |rated: &RatedCandidate| rated.occupied < 2.0 * rated.seats;
    let bearable = pool.iter().filter(|rated| is_bearable(rated));
    let longest = bearable.map(|rated| rated.matched_tokens).max().unwrap_or(0);
    if longest > 0 {
        narrow(pool, |rated| is_bearable(rated) && rated.matched_tokens == longest);
    }
}

/// Keeps the candidates that pass, if there are any.
fn narrow(pool: &mut Vec<RatedCandidate>, passes: impl Fn(&RatedCandidate) -> bool) {
    if pool.iter().any(&passes) {
        pool.retain(passes);
    }
}

/// The pool must not be empty.
fn choose(strategy: Strategy, pool: &[RatedCandidate], random: u64) -> &RatedCandidate {
    match strategy {
        Strategy::Balanced => draw_balanced(pool, random),
        Strategy::PrefixCache if pool[0].matched_tokens == 0 => draw_balanced(pool, random),
        Strategy::PrefixCache | Strategy::LeastRequest => least(pool, random, RatedCandidate::crowd),
        Strategy::LeastLatency => {
            // A candidate that was not measured counts as the fastest, so that it will be measured.
            let pace = pace(pool);
            least(pool, random, |rated| {
                let own = rated.reply_time();
                (if own > 0.0 { own } else { pace * (1.0 + rated.occupied / rated.seats) }) / rated.health
            })
        }
        Strategy::LeastKvCache => {
            let on_the_way = |rated: &RatedCandidate| rated.occupied / rated.seats / 100.0;
            least(pool, random, |rated| (0.01 + rated.kv_usage + on_the_way(rated)) / rated.health)
        }
        Strategy::Throughput => {
            let fastest = pool.iter().map(|rated| rated.drain).fold(0.0, f64::max);
            let rate = |rated: &RatedCandidate| if rated.drain > 0.0 { rated.drain } else { fastest.max(1.0) };
            least(pool, random, |rated| rated.crowd() / rate(rated))
        }
        Strategy::Random => draw(pool, random, |rated| rated.health),
        Strategy::PowerOfTwo => {
            let (first, second) = two_of(pool.len(), random);
            if pool[second].crowd() < pool[first].crowd() { &pool[second] } else { &pool[first] }
        }
    }
}

fn draw_balanced(pool: &[RatedCandidate], random: u64) -> &RatedCandidate {
    let pace = pace(pool);
    draw(pool, random, |rated| rated.balanced_weight(pace))
}

/// Draws with probabilities proportional to the weights, none of which is 0.
fn draw(pool: &[RatedCandidate], random: u64, weight: impl Fn(&RatedCandidate) -> f64) -> &RatedCandidate {
    let total: f64 = pool.iter().map(&weight).sum();
    let mut point = unit(random) * total;
    let drawn = pool.iter().find(|rated| {
        point -= weight(rated);
        point < 0.0
    });
    drawn.unwrap_or(&pool[pool.len() - 1])
}

/// The cheapest; of equals this node, since a hop costs time, else a random one.
fn least(pool: &[RatedCandidate], random: u64, cost: impl Fn(&RatedCandidate) -> f64) -> &RatedCandidate {
    let lowest = pool.iter().map(&cost).min_by(f64::total_cmp).expect("the pool is not empty");
    let cheapest: Vec<&RatedCandidate> = pool.iter().filter(|rated| cost(rated) <= lowest).collect();
    let here = cheapest.iter().find(|rated| rated.is_here);
    here.unwrap_or(&cheapest[(random % cheapest.len() as u64) as usize])
}

/// Two indices, which differ if there are two.
fn two_of(len: usize, random: u64) -> (usize, usize) {
    let first = (random >> 32) as usize % len;
    if len == 1 {
        return (first, first);
    }
    let second = (random & u64::from(u32::MAX)) as usize % (len - 1);
    (first, second + usize::from(second >= first))
}

/// When the waiting work of all candidates will be done.
fn retry_after(usable: &[RatedCandidate]) -> Duration {
    let backlog: f64 = usable.iter().map(|rated| rated.backlog).sum();
    let drain: f64 = usable.iter().map(|rated| rated.drain).sum();
    let seconds = if drain > 0.0 { backlog / drain } else { 0.0 };
    Duration::try_from_secs_f64(seconds).unwrap_or(MAX_RETRY_AFTER).clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER)
}

/// A peer may report any value.
pub fn sane(value: f32) -> f64 {
    if value.is_finite() { f64::from(value.max(0.0)) } else { 0.0 }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
