from django.db import migrations, models
from django.utils import timezone


class Migration(migrations.Migration):

    dependencies = [
        ('providers', '0005_provider_use'),
    ]

    operations = [
        migrations.AddField(
            model_name='upstreammodel',
            name='version',
            field=models.PositiveIntegerField(default=0, editable=False),
        ),
        migrations.AddField(
            model_name='upstreammodel',
            name='created_by',
            field=models.CharField(blank=True, default='', editable=False, max_length=150),
            preserve_default=False,
        ),
        migrations.AddField(
            model_name='upstreammodel',
            name='updated_at',
            field=models.DateTimeField(auto_now=True, default=timezone.now),
            preserve_default=False,
        ),
    ]
