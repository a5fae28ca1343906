// A program beside nkv that works on topics with Kafka's own client: one command a line in, one answer a line out.

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.Semaphore;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.AlterConfigOp;
import org.apache.kafka.clients.admin.ConfigEntry;
import org.apache.kafka.clients.admin.NewTopic;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.config.ConfigResource;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

public class Foreign {
    static String servers;
    static Admin admin;
    static final Map<String, KafkaProducer<byte[], byte[]>> producers = new HashMap<>();

    public static void main(String[] args) throws Exception {
        servers = args[0];
        admin = Admin.create(Map.of("bootstrap.servers", servers));
        var in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        System.out.println("ready");
        for (String line; (line = in.readLine()) != null; ) {
            try {
                System.out.println(run(line.split("\t", -1)));
            } catch (Exception error) {
                System.out.println("error " + (error.toString() + " " + error.getCause()).replace('\n', ' '));
            }
        }
        System.exit(0);
    }

    static String run(String[] words) throws Exception {
        switch (words[0]) {
            case "create": {
                var configs = new HashMap<String, String>();
                for (int i = 3; i < words.length; i++) {
                    configs.put(words[i].split("=", 2)[0], words[i].split("=", 2)[1]);
                }
                var topic = new NewTopic(words[1], Integer.parseInt(words[2]), (short) 1).configs(configs);
                admin.createTopics(Set.of(topic)).all().get();
                return "ok";
            }
            case "drop":
                admin.deleteTopics(Set.of(words[1])).all().get();
                return "ok";
            case "alter": {
                var resource = new ConfigResource(ConfigResource.Type.TOPIC, words[1]);
                var entry = new ConfigEntry(words[2].split("=", 2)[0], words[2].split("=", 2)[1]);
                var op = new AlterConfigOp(entry, AlterConfigOp.OpType.SET);
                admin.incrementalAlterConfigs(Map.of(resource, Set.of(op))).all().get();
                return "ok";
            }
            case "config": {
                var resource = new ConfigResource(ConfigResource.Type.TOPIC, words[1]);
                return admin.describeConfigs(Set.of(resource)).all().get().get(resource).get(words[2]).value();
            }
            case "topics":
                return String.join(" ", admin.listTopics().names().get());
            case "partitions":
                return "" + admin.describeTopics(Set.of(words[1])).allTopicNames().get().get(words[1]).partitions().size();
            // put TOPIC KEY VALUE [COMPRESSION]
            case "put": {
                var producer = producer(words.length > 4 ? words[4] : "none", null);
                var record = new ProducerRecord<>(words[1], 0, bytes(words[2]), bytes(words[3]));
                return "" + producer.send(record).get().offset();
            }
            case "transaction": {
                // transaction NAME begin|commit|abort, or put TOPIC KEY VALUE
                var producer = producer("none", words[1]);
                switch (words[2]) {
                    case "begin":
                        producer.beginTransaction();
                        return "ok";
                    case "commit":
                        producer.commitTransaction();
                        return "ok";
                    case "abort":
                        producer.abortTransaction();
                        return "ok";
                    default:
                        var record = new ProducerRecord<>(words[3], 0, bytes(words[4]), bytes(words[5]));
                        return "" + producer.send(record).get().offset();
                }
            }
            // fill TOPIC COUNT ROUNDS LEN
            case "fill": {
                var producer = producer("none", null);
                var value = new byte[Integer.parseInt(words[4])];
                Arrays.fill(value, (byte) 'v');
                for (int round = 0; round < Integer.parseInt(words[3]); round++) {
                    for (int key = 0; key < Integer.parseInt(words[2]); key++) {
                        byte[] name = ("k." + key).getBytes(StandardCharsets.UTF_8);
                        producer.send(new ProducerRecord<>(words[1], 0, name, value));
                    }
                }
                producer.flush();
                return "ok";
            }
            // bench TOPIC COUNT AT_ONCE LEN: microseconds of the median put, and puts a second
            case "bench": {
                var producer = producer("none", null);
                int count = Integer.parseInt(words[2]), atOnce = Integer.parseInt(words[3]);
                var value = new byte[Integer.parseInt(words[4])];
                var took = new long[count];
                var room = new Semaphore(atOnce);
                long began = System.nanoTime();
                for (int i = 0; i < count; i++) {
                    room.acquire();
                    int number = i;
                    long sent = System.nanoTime();
                    byte[] name = ("b." + i % 100).getBytes(StandardCharsets.UTF_8);
                    producer.send(new ProducerRecord<>(words[1], 0, name, value), (done, error) -> {
                        took[number] = System.nanoTime() - sent;
                        room.release();
                    });
                }
                room.acquire(atOnce);
                long all = System.nanoTime() - began;
                Arrays.sort(took);
                return took[count / 2] / 1000 + " " + count * 1_000_000_000L / all;
            }
            // read TOPIC: all records, as they are
            case "read": {
                var found = new ArrayList<String>();
                for (var record : records(words[1])) {
                    found.add(record.offset() + ":" + text(record.key()) + "=" + text(record.value()) + headers(record));
                }
                return String.join(" ", found);
            }
            default:
                throw new IllegalArgumentException(words[0]);
        }
    }

    static String headers(ConsumerRecord<byte[], byte[]> record) {
        var text = new StringBuilder();
        record.headers().forEach(header -> text.append("#").append(header.key()));
        return text.toString();
    }

    static List<ConsumerRecord<byte[], byte[]>> records(String topic) {
        Map<String, Object> options = Map.of("bootstrap.servers", servers, "auto.offset.reset", "earliest");
        var found = new ArrayList<ConsumerRecord<byte[], byte[]>>();
        try (var consumer = new KafkaConsumer<>(options, new ByteArrayDeserializer(), new ByteArrayDeserializer())) {
            var partition = new TopicPartition(topic, 0);
            consumer.assign(List.of(partition));
            consumer.seekToBeginning(List.of(partition));
            long end = consumer.endOffsets(List.of(partition)).get(partition);
            while (consumer.position(partition) < end) {
                consumer.poll(Duration.ofMillis(100)).forEach(found::add);
            }
        }
        return found;
    }

    static KafkaProducer<byte[], byte[]> producer(String compression, String transaction) {
        return producers.computeIfAbsent(compression + " " + transaction, unused -> {
            Map<String, Object> options = new HashMap<>();
            options.put("bootstrap.servers", servers);
            options.put("acks", "all");
            options.put("linger.ms", "0");
            options.put("compression.type", compression);
            options.put("max.request.size", "" + (16 << 20));
            if (transaction != null) {
                options.put("transactional.id", transaction);
            }
            var producer = new KafkaProducer<>(options, new ByteArraySerializer(), new ByteArraySerializer());
            if (transaction != null) {
                producer.initTransactions();
            }
            return producer;
        });
    }

    // ~ is null, hex:00ff are bytes, len:N are N bytes of 'v'.
    static byte[] bytes(String text) {
        if (text.equals("~")) {
            return null;
        }
        if (text.startsWith("hex:")) {
            return HexFormat.of().parseHex(text.substring(4));
        }
        if (text.startsWith("len:")) {
            return "v".repeat(Integer.parseInt(text.substring(4))).getBytes(StandardCharsets.UTF_8);
        }
        return text.getBytes(StandardCharsets.UTF_8);
    }

    static String text(byte[] bytes) {
        return bytes == null ? "~" : new String(bytes, StandardCharsets.UTF_8);
    }
}
