//! Connection limits: which connections may stay, and which one is closed to make room. A pure core: time is passed in.
//!
//! Each connection occupies a place. When all are taken, a new connection gets the place of the one that has been idle longest.
//! If none has been idle for `GRACE`, it gets one of a few overflow places, where everything but the health routes is refused.
//! Overflow places are reused in the same way, so probes are answered under any number of clients. Running requests are never
//! cut off; requests whose bodies do not arrive are.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

/// Minimum time before a connection can be closed in favour of another: since it was opened or became idle, since its request
/// began if the body has not arrived, or, in the overflow, since it was answered. It is long enough for an active client to
/// send its next request, and short enough to admit a few hundred new connections per second (fewer
/// while the closed ones end slowly).
const GRACE: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceLimits {
    /// Connections that are served.
    pub served: usize,
    /// Further connections, which get 503 or the health routes.
    pub overflow: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    Served,
    Overflow,
}

/// Ordered by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// No request is running.
    Idle,
    /// It has requests, and the bodies of all of them are incomplete.
    Receiving,
    Busy,
}

/// How a connection is told to close.
#[derive(Clone, Debug, Default)]
pub struct Closing {
    /// The connection's place has been given to another one: close after the current request. A request that is just arriving
    /// may still be answered.
    pub end: CancellationToken,
    /// Close at once, without waiting for the current request. Always set together with `end`.
    pub cut: CancellationToken,
}

pub struct Places {
    served: Row,
    overflow: Row,
    /// All open connections, including those that have lost their place and have not closed yet.
    connections: HashMap<ConnectionId, ConnectionState>,
    next_id: u64,
}

/// The places of one tier (served or overflow).
struct Row {
    limit: usize,
    taken: usize,
    /// For each activity, the connections, ordered by when they became idle or busy.
    order: [BTreeSet<(Instant, ConnectionId)>; 3],
}

struct ConnectionState {
    tier: Tier,
    /// Unanswered requests, and other reasons why the connection is not idle.
    occupations: u32,
    /// Requests whose bodies are incomplete.
    bodies: u32,
    /// When it last became idle or busy.
    since: Instant,
    /// None once its place has been given to another connection.
    closing: Option<Closing>,
}

impl ConnectionState {
    fn activity(&self) -> Activity {
        match self.occupations {
            0 => Activity::Idle,
            occupations if self.bodies >= occupations => Activity::Receiving,
            _ => Activity::Busy,
        }
    }
}

impl Row {
    fn new(limit: usize) -> Self {
        Self { limit, taken: 0, order: Default::default() }
    }

    fn insert(&mut self, id: ConnectionId, connection: &ConnectionState) {
        self.order[connection.activity() as usize].insert((connection.since, id));
        self.taken += 1;
    }

    fn remove(&mut self, id: ConnectionId, connection: &ConnectionState) {
        let was_there = self.order[connection.activity() as usize].remove(&(connection.since, id));
        assert!(was_there, "a connection with a place stands in its row");
        self.taken -= 1;
    }

    /// The connection that has been in this activity longest.
    fn first(&self, activity: Activity) -> Option<(Instant, ConnectionId)> {
        self.order[activity as usize].first().copied()
    }
}

impl Places {
    pub fn new(limits: PlaceLimits) -> Self {
        Self {
            served: Row::new(limits.served),
            overflow: Row::new(limits.overflow),
            connections: HashMap::new(),
            next_id: 0,
        }
    }

    /// Adds a new connection. Returns none if all places are taken by connections younger than `GRACE`; the caller tries again.
    pub fn enter(&mut self, now: Instant, closing: Closing) -> Option<ConnectionId> {
        let tier = [Tier::Served, Tier::Overflow].into_iter().find(|tier| self.make_room(*tier, now))?;
        let id = ConnectionId(self.next_id);
        self.next_id += 1;
        let connection = ConnectionState { tier, occupations: 0, bodies: 0, since: now, closing: Some(closing) };
        self.row(tier).insert(id, &connection);
        self.connections.insert(id, connection);
        Some(id)
    }

    /// A request begins. Returns the tier that answers it: a connection in the overflow is served if a place has become free.
    pub fn request_begins(&mut self, id: ConnectionId, has_body: bool, now: Instant) -> Tier {
        let waits = |connection: &ConnectionState| connection.tier == Tier::Overflow && connection.closing.is_some();
        let is_promoted = self.connections.get(&id).is_some_and(waits) && self.make_room(Tier::Served, now);
        self.occupy(id, now);
        self.change(id, |connection| {
            connection.bodies += u32::from(has_body);
            if is_promoted {
                connection.tier = Tier::Served;
            }
        });
        self.connections.get(&id).map_or(Tier::Overflow, |connection| connection.tier)
    }

    /// The body of a request has arrived, or is no longer wanted.
    pub fn body_ends(&mut self, id: ConnectionId) {
        self.change(id, |connection| connection.bodies -= 1);
    }

    /// Marks the connection as busy until `vacate`.
    pub fn occupy(&mut self, id: ConnectionId, now: Instant) {
        self.change(id, |connection| {
            if connection.occupations == 0 {
                connection.since = now;
            }
            connection.occupations += 1;
        });
    }

    /// Ends one `occupy`: a request was answered or abandoned.
    pub fn vacate(&mut self, id: ConnectionId, now: Instant) {
        self.change(id, |connection| {
            connection.occupations -= 1;
            if connection.occupations == 0 {
                connection.since = now;
            }
        });
    }

    /// Since when the connection is idle; none if it is busy.
    pub fn idle_since(&self, id: ConnectionId) -> Option<Instant> {
        self.connections.get(&id).filter(|connection| connection.occupations == 0).map(|connection| connection.since)
    }

    pub fn is_idle(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_none_or(|connection| connection.occupations == 0)
    }

    /// The connection has closed.
    pub fn leave(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.remove(&id) else { return };
        if connection.closing.is_some() {
            self.row(connection.tier).remove(id, &connection);
        }
    }

    /// Closes up to `count` of the longest idle connections. Used when file descriptors run out before places do.
    pub fn close_idle(&mut self, count: usize) {
        for _ in 0..count {
            let idle = [&self.served, &self.overflow].into_iter().filter_map(|row| row.first(Activity::Idle));
            let Some((_, id)) = idle.min() else { return };
            self.close(id);
        }
    }

    fn row(&mut self, tier: Tier) -> &mut Row {
        match tier {
            Tier::Served => &mut self.served,
            Tier::Overflow => &mut self.overflow,
        }
    }

    /// Frees a place of this tier if possible. Returns whether one is free.
    fn make_room(&mut self, tier: Tier, now: Instant) -> bool {
        let row = self.row(tier);
        if row.taken < row.limit {
            return true;
        }
        let first_of_age =
            |activity| row.first(activity).filter(|(since, _)| now.saturating_duration_since(*since) >= GRACE);
        let waiting = first_of_age(Activity::Idle).or_else(|| first_of_age(Activity::Receiving));
        let victim = waiting.or_else(|| match tier {
            Tier::Served => None,
            Tier::Overflow => first_of_age(Activity::Busy),
        });
        match victim {
            Some((_, id)) => self.close(id),
            None => return false,
        }
        true
    }

    /// Takes the connection's place away and tells it to close.
    fn close(&mut self, id: ConnectionId) {
        let mut was_idle = false;
        let mut closing = None;
        self.change(id, |connection| {
            was_idle = connection.occupations == 0;
            closing = connection.closing.take();
        });
        let Some(closing) = closing else { return };
        if !was_idle {
            closing.cut.cancel();
        }
        closing.end.cancel();
    }

    /// Changes a connection, and keeps the order up to date.
    fn change(&mut self, id: ConnectionId, change: impl FnOnce(&mut ConnectionState)) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        if connection.closing.is_some() {
            self.row(connection.tier).remove(id, &connection);
        }
        change(&mut connection);
        if connection.closing.is_some() {
            self.row(connection.tier).insert(id, &connection);
        }
        self.connections.insert(id, connection);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const LIMITS: PlaceLimits = PlaceLimits { served: 2, overflow: 1 };

    struct Hall {
        places: Places,
        now: Instant,
        closings: HashMap<ConnectionId, Closing>,
    }

    impl Hall {
        fn new() -> Self {
            Self { places: Places::new(LIMITS), now: Instant::now(), closings: HashMap::new() }
        }

        fn enter(&mut self) -> Option<ConnectionId> {
            let closing = Closing::default();
            let id = self.places.enter(self.now, closing.clone())?;
            self.closings.insert(id, closing);
            Some(id)
        }

        /// A new connection, after `GRACE` has passed for all others.
        fn newcomer(&mut self) -> ConnectionId {
            self.wait(GRACE);
            self.enter().expect("a place")
        }

        fn begin(&mut self, id: ConnectionId, has_body: bool) -> Tier {
            self.places.request_begins(id, has_body, self.now)
        }

        /// A new connection with a running request.
        fn busy(&mut self) -> (ConnectionId, Tier) {
            let id = self.newcomer();
            let tier = self.begin(id, false);
            (id, tier)
        }

        fn wait(&mut self, time: Duration) {
            self.now += time;
        }

        fn vacate(&mut self, id: ConnectionId) {
            self.places.vacate(id, self.now);
        }

        /// Whether the connection was told to end, and whether at once.
        fn fate(&self, id: ConnectionId) -> (bool, bool) {
            (self.closings[&id].end.is_cancelled(), self.closings[&id].cut.is_cancelled())
        }
    }

    const STAYS: (bool, bool) = (false, false);
    const ENDS: (bool, bool) = (true, false);
    const IS_CUT: (bool, bool) = (true, true);

    #[test]
    fn the_one_that_is_idle_for_longest_gives_way() {
        let mut hall = Hall::new();
        let (first, second) = (hall.newcomer(), hall.newcomer());
        // The first connection has had a request since, so the second one has been idle longer.
        hall.begin(first, false);
        hall.wait(GRACE);
        hall.vacate(first);
        let third = hall.newcomer();
        assert_eq!((hall.fate(first), hall.fate(second)), (STAYS, ENDS));
        assert_eq!(hall.begin(third, false), Tier::Served);
        let fourth = hall.newcomer();
        assert_eq!((hall.fate(first), hall.fate(third)), (ENDS, STAYS));
        assert_eq!(hall.begin(fourth, false), Tier::Served);
    }

    #[test]
    fn whoever_came_a_moment_ago_is_not_closed_for_the_next() {
        let mut hall = Hall::new();
        let all = [(); 3].map(|()| hall.enter().expect("there is room"));
        assert_eq!(hall.enter(), None);
        assert!(all.iter().all(|id| hall.fate(*id) == STAYS));
        // Two of them have sent a request in the meantime; the third is in the overflow.
        assert_eq!([0, 1].map(|at| hall.begin(all[at], false)), [Tier::Served; 2]);
        hall.wait(GRACE);
        let next = hall.enter().expect("room again");
        assert_eq!(all.map(|id| hall.fate(id)), [STAYS, STAYS, ENDS]);
        assert_eq!(hall.begin(next, false), Tier::Overflow);
    }

    #[test]
    fn where_all_are_busy_newcomers_stand_in_the_overflow_until_there_is_room() {
        let mut hall = Hall::new();
        let ((first, _), (second, _)) = (hall.busy(), hall.busy());
        let (third, tier) = hall.busy();
        assert_eq!(tier, Tier::Overflow);
        hall.vacate(third);
        // The next connection takes its place and is served, since another connection is idle when its request comes.
        let fourth = hall.newcomer();
        assert_eq!(hall.fate(third), ENDS);
        hall.vacate(first);
        hall.wait(GRACE);
        assert_eq!(hall.begin(fourth, false), Tier::Served);
        assert_eq!((hall.fate(first), hall.fate(second)), (ENDS, STAYS));
    }

    #[test]
    fn the_overflow_is_recycled_whatever_its_connections_do() {
        let mut hall = Hall::new();
        let served = [hall.busy().0, hall.busy().0];
        let (busy, _) = hall.busy();
        assert_eq!(hall.enter(), None, "its answer has not had time");
        let next = hall.newcomer();
        assert_eq!((hall.fate(busy), hall.fate(next)), (IS_CUT, STAYS));
        assert!(served.iter().all(|id| hall.fate(*id) == STAYS));
    }

    #[test]
    fn a_body_that_does_not_arrive_gives_way_to_newcomers_and_a_request_that_runs_does_not() {
        let mut hall = Hall::new();
        let ((runs, _), uploads) = (hall.busy(), hall.newcomer());
        hall.begin(uploads, true);
        let refused = hall.enter().expect("a place in the overflow");
        assert_eq!(hall.begin(refused, false), Tier::Overflow, "a body has its time");
        hall.places.leave(refused);
        let served = hall.newcomer();
        assert_eq!((hall.fate(runs), hall.fate(uploads)), (STAYS, IS_CUT));
        assert_eq!(hall.begin(served, true), Tier::Served);
        // A request whose body has arrived is running, and is not cut off.
        hall.places.body_ends(served);
        let refused = hall.newcomer();
        assert_eq!((hall.begin(refused, false), hall.fate(served)), (Tier::Overflow, STAYS));
    }

    #[test]
    fn without_descriptors_the_longest_idle_one_goes() {
        let mut hall = Hall::new();
        let (older, newer) = (hall.newcomer(), hall.newcomer());
        hall.places.close_idle(1);
        assert_eq!((hall.fate(older), hall.fate(newer)), (ENDS, STAYS));
        let (busy, _) = hall.busy();
        hall.places.close_idle(5);
        assert_eq!((hall.fate(newer), hall.fate(busy)), (ENDS, STAYS));
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Enter,
        Begin { has_body: bool },
        BodyEnds,
        Vacate,
        Leave,
        Wait,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Enter),
            4 => any::<bool>().prop_map(|has_body| Step::Begin { has_body }),
            2 => Just(Step::BodyEnds),
            2 => Just(Step::Vacate),
            1 => Just(Step::Leave),
            1 => Just(Step::Wait),
        ]
    }

    proptest! {
        /// For any order of events: the number of places is never exceeded, a running request in a served place is never cut
        /// off, and a new connection gets a served place if another has been idle there for `GRACE`.
        #[test]
        fn promises_hold_in_any_order(steps in prop::collection::vec((step(), any::<prop::sample::Index>()), 1..200)) {
            let mut hall = Hall::new();
            // Of each connection: its requests, how many of them have incomplete bodies, and its tier.
            let mut open: Vec<(ConnectionId, u32, u32, Tier)> = Vec::new();
            let mut gone = HashSet::new();
            for (step, which) in steps {
                let chosen = (!open.is_empty()).then(|| which.index(open.len()));
                let stays = |hall: &Hall, id| hall.fate(id) == STAYS;
                match (step, chosen) {
                    (Step::Enter, _) => {
                        let is_idle = |(id, requests, _, tier): &(ConnectionId, u32, _, Tier)| {
                            let since = hall.places.connections[id].since;
                            let is_of_age = hall.now.duration_since(since) >= GRACE;
                            *requests == 0 && *tier == Tier::Served && is_of_age && stays(&hall, *id)
                        };
                        let somebody_idle = open.iter().any(is_idle);
                        if let Some(id) = hall.enter() {
                            let tier = hall.places.connections[&id].tier;
                            prop_assert!(tier == Tier::Served || !somebody_idle);
                            open.push((id, 0, 0, tier));
                        } else {
                            prop_assert!(!somebody_idle);
                        }
                    }
                    (Step::Begin { has_body }, Some(at)) => {
                        let id = open[at].0;
                        open[at].3 = hall.begin(id, has_body);
                        open[at].1 += 1;
                        open[at].2 += u32::from(has_body);
                    }
                    (Step::BodyEnds, Some(at)) if open[at].2 > 0 => {
                        open[at].2 -= 1;
                        hall.places.body_ends(open[at].0);
                    }
                    (Step::Vacate, Some(at)) if open[at].1 > open[at].2 => {
                        open[at].1 -= 1;
                        let now = hall.now;
                        hall.places.vacate(open[at].0, now);
                    }
                    (Step::Leave, Some(at)) => hall.places.leave(open.swap_remove(at).0),
                    (Step::Wait, _) => hall.wait(GRACE / 2),
                    _ => {}
                }
                let in_tier = |tier| open.iter().filter(|it| it.3 == tier && stays(&hall, it.0)).count();
                prop_assert!(in_tier(Tier::Served) <= LIMITS.served);
                prop_assert!(in_tier(Tier::Overflow) <= LIMITS.overflow);
                for (id, requests, bodies, tier) in &open {
                    let runs = requests > bodies && *tier == Tier::Served;
                    let is_cut_now = hall.fate(*id) == IS_CUT && gone.insert(*id);
                    prop_assert!(!(runs && is_cut_now), "a request that runs was cut");
                }
            }
        }
    }
}
